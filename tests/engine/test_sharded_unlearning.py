"""Sharded tuning: what is left after rows are forgotten is what would be there had they never come."""

import hashlib
import itertools
import json

import pytest
import torch

from federating import plan, quiet
from kilotune.core.errors import IncompatibleError, RecipeError, RunError
from kilotune.engine.alone import tune
from kilotune.engine.files import read_tensors
from kilotune.engine.model.base import load_base
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rows.data import load_rows
from kilotune.engine.training import sharded
from kilotune.engine.training.sharded import unlearn
from kilotune.engine.training.shards import cyclic_orders, layer_groups, layer_of, place, row_id, surely_survives

SMALL = (
    "sharding.slices=2",
    "parametrization.config={r: 2, lora_alpha: 4, target_modules: [q_proj, down_proj]}",
    "optimizer.lr=0.01",
    "steps=2",
    "evaluation.limit=3",
)


def slices_of(path, seed=0, shards=1, slices=2) -> dict[tuple[int, int], list[str]]:
    """The lines of a data file by shard and slice; held-out lines are left out."""
    found: dict[tuple[int, int], list[str]] = {}
    for row, line in zip(load_rows(str(path)), path.read_text().splitlines(), strict=True):
        if row.split == "train":
            found.setdefault(place(row_id(row), seed, shards, slices), []).append(line)
    return found


def recipe(base, data, *settings):
    return plan(base, data, "local_unlearning", *SMALL, *settings)


def files(folder) -> dict[str, str]:
    paths = (folder / "stages").rglob("*.safetensors")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


# -- orders, places, layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 5])
def test_each_slice_stands_once_at_each_place_of_the_rotations(length):
    orders = cyclic_orders(length, length)
    for position in range(length):
        assert sorted(order[position] for order in orders) == list(range(length))


def test_more_orders_are_all_different_and_every_permutation_comes():
    orders = cyclic_orders(4, 100)
    assert sorted(orders) == sorted(itertools.permutations(range(4)))
    assert cyclic_orders(4, 9)[:4] == cyclic_orders(4, 4)


@pytest.mark.parametrize("length", [3, 6])
def test_the_longest_prefix_over_rotations_is_the_longest_cyclic_gap(length):
    """Kills: an order that is cut behind the deleted slice; the first order that has anything left."""
    orders = cyclic_orders(length, length)
    for count in range(1, length + 1):
        for deleted in itertools.combinations(range(length), count):
            gaps = [(b - a - 1) % length for a, b in zip(deleted, (*deleted[1:], deleted[0]), strict=True)]
            gap = max(gaps) if count > 1 else length - 1
            left = max(next((n for n, s in enumerate(o) if s in deleted), length) for o in orders)
            assert left == gap
            assert surely_survives(orders, deleted) == length - count - (count < length)


@pytest.mark.parametrize("budget", [1, 2, 4])
def test_a_shard_survives_as_many_deletions_as_promised_and_not_always_more(budget):
    """Kills: a promise that an unlucky sequence of requests breaks; one that no sequence needs."""
    orders = cyclic_orders(4, budget)
    promised = surely_survives(orders)
    assert promised == budget - 1

    def stands(deleted) -> bool:
        return any(order[0] not in deleted for order in orders)

    assert all(stands(set(deleted)) for deleted in itertools.permutations(range(4), promised))
    assert not all(stands(set(deleted)) for deleted in itertools.permutations(range(4), promised + 1))


def test_layers_are_told_apart_by_number():
    """Kills: `layers.2` that also means 20 to 29."""
    names = [f"model.layers.{n}.mlp.down_proj.lora_A.weight" for n in range(30)] + ["model.lm_head.lora_A.weight"]
    groups = layer_groups(names, 10)
    assert [sorted(layer_of(name) for name in group) for group in groups] == [
        [27 - 3 * i, 28 - 3 * i, 29 - 3 * i] for i in range(10)
    ]
    assert [len(group) for group in layer_groups(names, 4)] == [7, 7, 7, 9]
    with pytest.raises(RecipeError, match="expected at most 30"):
        layer_groups(names, 31)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [(), ("sharding.cumulative=false",), ("sharding.shards=2",)])
def test_forgetting_leaves_what_training_without_the_row_leaves(base, data, tmp_path, settings):
    """Kills: batches, seeds or places that hang on other slices' rows; a stage that saw the row and stays."""
    shards = 2 if "sharding.shards=2" in settings else 1
    tune(recipe(base, data, *settings), tmp_path / "run", quiet)
    members = slices_of(data, shards=shards)
    at = max(members)
    line = members[at][0]
    (tmp_path / "forget.jsonl").write_text(line + "\n")
    result = unlearn(tmp_path / "run", str(tmp_path / "forget.jsonl"), quiet)
    less = tmp_path / "less.jsonl"
    less.write_text("".join(f"{other}\n" for other in data.read_text().splitlines() if other != line))
    tune(recipe(base, less, *settings), tmp_path / "never", quiet)
    left, never = files(tmp_path / "run"), files(tmp_path / "never")
    assert left
    assert left == {name: digest for name, digest in never.items() if name in left}
    served = [order for order in result["serving"] if order]
    assert result["rows"] == 1
    assert at[1] not in result["serving"][at[0]]
    assert len(served) == shards
    if shards == 2:
        return
    again = tune(recipe(base, data, *settings), tmp_path / "run", quiet)  # the file still holds the row: it stays out
    assert files(tmp_path / "run") == never
    assert again["digest"] == json.loads((tmp_path / "never" / "summary.json").read_text())["digest"]


def test_a_stage_moves_its_own_layers_only(base, data, tmp_path):
    """Kills: an adapter trained as a whole at each stage."""
    tune(recipe(base, data), tmp_path, quiet)
    model = Replica(load_base(str(base)), recipe(base, data))
    start = {name: value.clone() for name, value in model.trainable.wire.items()}
    for order, layers in (((0,), {1}), ((0, 1), {0}), ((1,), {1}), ((1, 0), {0})):
        name = "-".join(map(str, order))
        tensors, _ = read_tensors(tmp_path / "stages" / "0" / f"{name}.safetensors")
        assert {layer_of(key) for key in tensors} == layers
        assert any(not torch.equal(value, start[key]) for key, value in tensors.items())
    checkpoint, _ = read_tensors(tmp_path / "checkpoint.safetensors")
    best = {**start}
    for name in ("0", "0-1"):
        best |= read_tensors(tmp_path / "stages" / "0" / f"{name}.safetensors")[0]
    assert all(torch.equal(checkpoint[f"state/{name}"], value) for name, value in best.items())


def test_the_served_adapter_is_the_mean_of_the_shards(base, data, tmp_path):
    """Kills: the mean of the factors instead of the products; a scale that follows the rank."""
    composed = recipe(base, data, "sharding.shards=2")
    tune(composed, tmp_path, quiet)
    start = Replica(load_base(str(base)), composed)
    parts = []
    for shard in ("0", "1"):
        part = {name: value.clone() for name, value in start.trainable.wire.items()}
        for name in ("0", "0-1"):
            part |= read_tensors(tmp_path / "stages" / shard / f"{name}.safetensors")[0]
        parts.append(part)
    served, _ = sharded._serve(sharded.RunFolder(tmp_path), composed, _stages(composed, tmp_path), parts[0], quiet)
    for name, module in served.model.named_modules():
        if not hasattr(module, "lora_A") or not hasattr(module, "get_delta_weight"):
            continue
        a, b = f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"
        wanted = sum(2.0 * part[b].double() @ part[a].double() for part in parts) / 2  # scale: lora_alpha / r = 2
        torch.testing.assert_close(module.get_delta_weight("default").double(), wanted, atol=1e-6, rtol=1e-5)


def _stages(composed, folder):
    return sharded.Stages(folder, composed, sharded.Manifest.read(folder))


def test_a_shard_without_a_prefix_is_trained_again_and_the_base_is_served_meanwhile(base, data, tmp_path):
    """Kills: weights that outlive the last stage that may be used."""
    tune(recipe(base, data), tmp_path / "run", quiet)
    members = slices_of(data)
    (tmp_path / "forget.jsonl").write_text("".join(f"{lines[0]}\n" for lines in members.values()))
    result = unlearn(tmp_path / "run", str(tmp_path / "forget.jsonl"), quiet)
    assert result["serving"] == [[]]
    assert (result["train_again"], result["survives"], result["stages_deleted"]) == ([0], [0], 4)
    assert result["digest"] == Replica(load_base(str(base)), recipe(base, data)).digest()
    with pytest.raises(RunError, match="none of its 2 rows"):
        unlearn(tmp_path / "run", str(tmp_path / "forget.jsonl"), quiet)
    assert tune(recipe(base, data), tmp_path / "run", quiet)["sharding"]["serving"] == [[0, 1]]


def test_a_run_cut_between_stages_goes_on_to_the_same_weights(base, data, tmp_path):
    """Kills: a stage that is trained twice or left half done."""
    whole = tune(recipe(base, data), tmp_path / "whole", quiet)

    class Killed(BaseException):
        pass

    def dying(event):
        if event["event"] == "step" and event["step"] == 3:
            raise Killed

    with pytest.raises(Killed):
        tune(recipe(base, data), tmp_path / "cut", dying)
    assert 0 < len(files(tmp_path / "cut")) < 4
    assert tune(recipe(base, data), tmp_path / "cut", quiet)["digest"] == whole["digest"]
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_what_sharding_cannot_do_is_refused(base, data):
    with pytest.raises(IncompatibleError, match="plain LoRA"):
        plan(base, data, "local_full", "sharding.slices=2")
    with pytest.raises(IncompatibleError, match=r"multiple of sharding\.slices"):
        recipe(base, data, "steps=3")
    with pytest.raises(RecipeError, match="kilotune withdraw"):
        plan(base, data, "fedavg_lora", "sharding.slices=2")
