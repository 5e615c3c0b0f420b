"""The planner's parts against what they stand for: a model's sizes, a run's batches, known costs, a budget."""

import json

import numpy as np
import pytest
import torch

from federating import plan as small_plan
from federating import write_rows
from kilotune.core.errors import RecipeError
from kilotune.engine.alone import tune
from kilotune.engine.composing.compose import compose
from kilotune.engine.model.base import load_base
from kilotune.engine.planning import budget, planner, slices, workload
from kilotune.engine.planning.budget import Budget, parse_size
from kilotune.engine.planning.facts import read_facts
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rows.batches import lay_out
from kilotune.engine.rows.tokenize import IGNORE, Example
from tiny import save_tiny

FIGURES = {
    "layer_s": 0.01,
    "layer_token_s": 1e-4,
    "rest_s": 0.5,
    "rest_token_s": 1e-5,
    "label_s": 1e-3,
    "layer_token_bytes": 50_000.0,
    "rest_token_bytes": 6_000.0,
    "idle_bytes": 400_000_000,
    "wire": {"1": {"coords": 64}, "3": {"coords": 64}},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows(count, seed=0):
    """Rows of differing length; some begin alike."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        ids = rng.integers(3, 300, rng.integers(6, 60)).astype(np.int32)
        ids[: number % 5] = 7
        labels = np.where(np.arange(len(ids)) >= len(ids) - 3, ids, IGNORE).astype(np.int32)
        found.append(Example(ids, labels, len(ids) - 3, "", None, number))
    return found


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "num_hidden_layers": 4}])
def test_facts_are_the_loaded_models(changes, tmp_path):
    """Kills: a tied head counted twice; keys and values of all heads where fewer are kept."""
    folder = save_tiny(tmp_path / "tiny", **changes)
    facts, base = read_facts("x", folder), load_base(str(folder))
    assert facts.shapes == {name: tuple(param.shape) for name, param in base.parameters().items()}
    with torch.no_grad():
        cache = base.model(input_ids=torch.ones(1, 5, dtype=torch.int64), use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert facts.cache * 5 == held
    assert (facts.layers, facts.hidden, facts.vocabulary) == (changes.get("num_hidden_layers", 2), 32, 300)
    assert facts.packs


@pytest.mark.parametrize("name", ["local_lora", "local_full", "kilotune"])
def test_trained_numbers_are_those_of_an_attached_model(name, tmp_path, data):
    """Kills: an adapter of the first layers counted for all; names that the codec would not meet."""
    folder = save_tiny(tmp_path / "tiny", num_hidden_layers=5)
    plan = small_plan(folder, data, name)
    replica = Replica(load_base(str(folder), writable=True), plan)
    wire = {str(layers): slices._Slice(plan, folder, layers).wire() for layers in (slices.SMALL, slices.LARGE)}
    found = planner.wire_numbers(plan, read_facts("x", folder), {"wire": wire})
    assert found == {key: value.numel() for key, value in replica.trainable.wire.items()}


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("limit", [1, 90, 4096])
def test_batches_are_those_of_a_run(packs, limit):
    """Kills: padding or shared starts left out; a limit applied to rows in place of tokens."""
    examples = rows(24)
    laid = lay_out(examples, limit, 0, packs)
    assert workload.batch_tokens(examples, limit, packs) == [batch.input_ids.numel() for batch in laid]


def load_of(steps, labels=10.0):
    return workload.Workload(3, steps, labels, 60, 20.0, 8)


def test_costs_of_slices_add_up_to_those_of_the_whole(tmp_path):
    """Kills: the cost of a layer counted once, or the head's for every layer."""
    facts = read_facts("x", save_tiny(tmp_path / "tiny", num_hidden_layers=5))

    def cost(layers, tokens, labels):
        f = FIGURES
        rest = f["rest_s"] + tokens * f["rest_token_s"] + labels * f["label_s"]
        return layers * (f["layer_s"] + tokens * f["layer_token_s"]) + rest

    points = [(1, 128, 32), (1, 512, 32), (1, 512, 192), (3, 128, 32), (3, 512, 32)]
    kept = {
        layers: int(512 * (layers * FIGURES["layer_token_bytes"] + FIGURES["rest_token_bytes"])) for layers in (1, 3)
    }
    solved = slices._solve({point: cost(*point) for point in points}, kept)
    assert solved == pytest.approx({key: FIGURES[key] for key in solved})
    load = load_of([[700], [300]], labels=100.0)
    plan = compose("kilotune", "federate")
    assert planner.step_seconds(plan, facts, load, solved) == pytest.approx((cost(5, 700, 100) + cost(5, 300, 100)) / 2)


def test_figures_are_shared_by_plans_of_equal_cost_and_by_no_others(tmp_path):
    """Kills: a measurement for every learning rate; one measurement for forward and backward passes."""
    folder = save_tiny(tmp_path / "tiny")

    def key(name, *assignments):
        mode = "tune" if name.startswith("local_") else "federate"
        return slices._key(compose(name, mode, list(assignments)), folder)

    same = {
        key("kilotune"),
        key("kilotune", "basis.size=64"),
        key("kilotune", "optimizer.lr=1.0"),
        key("kilotune", "rounds=3"),
    }
    assert len(same) == 1
    assert (
        len(same | {key("kilotune_zeroth"), key("fedavg_lora"), key("local_full"), key("kilotune", "threads=1")}) == 5
    )
    other = save_tiny(tmp_path / "other", hidden_size=64)
    assert slices._key(compose("kilotune", "federate"), other) not in same


def test_a_measurement_is_remembered_until_it_is_asked_for_anew(tmp_path, data, monkeypatch):
    folder = save_tiny(tmp_path / "tiny")
    calls = []
    monkeypatch.setattr(slices, "_measure", lambda plan, folder: calls.append(1) or dict(FIGURES))
    plan = small_plan(folder, data, "kilotune")
    for probe, times, count in ((False, None, 0), (None, True, 1), (None, True, 1), (True, True, 2), (False, None, 2)):
        found = planner.predict(plan, None, probe)
        assert (found["seconds"] is None) == (times is None) and len(calls) == count


@pytest.mark.parametrize("settings", [(), ("sharding.cumulative=false", "sharding.orders=1", "sharding.shards=3")])
def test_the_time_of_sharding_counts_every_step_of_a_run(base, tmp_path, monkeypatch, settings):
    """Kills: the steps of one order for those of all; stages counted for each order that begins alike; stages that have
    no rows."""
    small = ("steps=4", "parametrization.config={r: 2, target_modules: [q_proj]}", "evaluation.limit=3")
    plan = small_plan(base, write_rows(tmp_path / "few.jsonl", 4, ("ada",)), "local_unlearning", *small, *settings)
    steps: list[dict] = []
    tune(plan, tmp_path / "run", lambda event: steps.append(event) if event["event"] == "step" else None)
    wire = {str(layers): {f"layers.{i}.A": 1 for i in range(layers)} for layers in (slices.SMALL, slices.LARGE)}
    monkeypatch.setattr(slices, "_measure", lambda plan, folder: FIGURES | {"wire": wire})
    found = planner.predict(plan, None, True)
    assert workload.planned_steps(plan, 1) == len(steps)
    assert found["seconds"] == pytest.approx(len(steps) * found["seconds_per_step"])


@pytest.mark.parametrize(
    ("seconds", "enough"),
    [([1.0, 1.05], False), ([3.0, 1.0, 1.05], True), ([1.0, 1.5, 1.6], False), ([1.0, 1.5, 1.6, 1.02], True)],
)
def test_a_step_is_tried_until_its_fastest_time_is_nearly_reached_again(seconds, enough):
    """Kills: a plan that is wrong by a factor because all tries of one point met a busy machine."""
    assert slices.settled(seconds) == enough


# -- memory -----------------------------------------------------------------------------------------------------------


def test_memory_counts_what_the_parts_keep(tmp_path):
    """Kills: a copy for forward passes that need none; activations without their layers; a dial without effect; what
    the server's rule keeps left out."""
    facts = read_facts("x", save_tiny(tmp_path / "tiny"))
    sizes = {}
    for name, assignments in (
        ("kilotune", []),
        ("kilotune", ["checkpointing=true"]),
        ("kilotune_zeroth", []),
        ("fedavg_full", []),
        ("diloco", []),
        ("co2", ["parametrization={name: full}"]),
    ):
        plan = compose(name, "federate", [*assignments, "evaluation.generate=false"])
        numel = planner.wire_numbers(plan, facts, FIGURES)
        load = workload.Workload(3, [[20_000]], 4.0, 60, 20.0, 0)
        sizes[name, *assignments] = planner.memory_bytes(plan, facts, numel, load, FIGURES)
    rest = FIGURES["idle_bytes"] + 4 * facts.numbers
    kept = 20_000 * (2 * FIGURES["layer_token_bytes"] + FIGURES["rest_token_bytes"])
    head = 4 * 300 * 32 + 4 * 2 * 4 * 300
    own = sizes["kilotune",] - rest - kept - head
    assert own == 4 * (facts.numbers + 2 * 8192)  # the copy to go back to, and AdamW's two moments
    less = sizes["kilotune",] - sizes["kilotune", "checkpointing=true"]
    assert less == 20_000 * (FIGURES["layer_token_bytes"] - 2 * 4 * 32)
    assert sizes["kilotune_zeroth",] < rest + 20_000 * FIGURES["layer_token_bytes"]
    assert sizes["fedavg_full",] - rest - kept - head == 4 * 3 * facts.numbers
    assert sizes["diloco",] - sizes["fedavg_full",] == 4 * facts.numbers  # the server's momentum
    everybody = sizes["co2", "parametrization={name: full}"] - sizes["fedavg_full",]
    assert everybody == 4 * 2 * facts.numbers  # momentum and the round that waits


# -- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("2GiB", 2 << 30), ("20kb", 20_000), ("1.5 MB", 1_500_000), ("300", 300)]
)
def test_sizes_in_words(text, size):
    """Kills: 1024 for k; a unit in small letters refused."""
    assert parse_size(text, "--max-memory") == size


@pytest.mark.parametrize("text", ["", "GB", "2XB", "-2GB", "0", "1e9", "2 G B"])
def test_a_malformed_size_is_one_line(text):
    with pytest.raises(RecipeError) as error:
        Budget.of(None, text, None)
    assert str(error.value) == f"--max-bytes: got {text!r}, expected a size above 0 such as 500MB, 2GB or 2GiB."


def test_every_mistake_in_a_budget_is_told():
    with pytest.raises(RecipeError) as error:
        Budget.of("much", "2XB", -1.0)
    assert [line.split(":")[0] for line in error.value.problems] == ["--max-memory", "--max-bytes", "--max-minutes"]


@pytest.fixture
def proposals(tmp_path, data, monkeypatch):
    """propose() with known figures, for the tiny model."""
    folder = save_tiny(tmp_path / "tiny")
    lora = {"1": {"base.layers.0.A": 600_000}, "3": {f"base.layers.{i}.A": 600_000 for i in range(3)}}

    def figures(plan, folder):
        return FIGURES | ({"wire": lora} if plan.parametrization.method_name() == "peft" else {})

    monkeypatch.setattr(slices, "_measure", figures)
    shared = [f"base={folder}", f"data.path={data}", "data.max_length=64", "batch_size=4"]
    return lambda recipe, limits, *more: budget.propose(recipe, [*shared, *more], None, limits, lambda event: None)


def names_of(entries):
    return [(entry["recipe"], *entry["set"][:1]) for entry in entries]


def test_without_limits_all_fit_in_the_expected_order(proposals):
    """Kills: an order of its own; candidates that cannot federate."""
    found = proposals(None, Budget())
    expected = [(name, *dials[:1]) for name, dials, _ in budget.EXPECTED if not name.startswith("local_")]
    assert names_of(found["fits"]) == expected and not found["exceeds"]
    json.dumps(found, allow_nan=False)


def test_bytes_are_up_and_down_together_and_the_reason_names_both_numbers(proposals):
    """Kills: one direction only; a reason without its number."""
    found = proposals(
        None, Budget(bytes=20_000), "local_steps=1", "micro_batch_tokens=256", "evaluation.generate=false"
    )
    refused = {entry["recipe"]: entry["exceeds"] for entry in found["exceeds"]}
    assert refused["fedavg_lora"] == ["bytes: 4.8 MB per client and round, allowed 20.0 kB"]
    assert names_of(found["fits"])[0] == ("kilotune",)
    assert ("kilotune", "basis.size=32768") in names_of(found["exceeds"])


def test_dials_are_turned_only_as_far_as_needed(proposals):
    """Kills: a smaller dial where the larger fits; steps given up where memory was asked for."""
    found = proposals("kilotune", Budget(), "basis.size=64")["fits"][-1]
    assert not [dial for dial in found["set"] if dial.startswith(("micro", "local", "check"))]
    seconds = found["seconds"] / 60
    fewer = proposals("kilotune", Budget(minutes=seconds / 2), "basis.size=64")["fits"][-1]
    assert fewer["set"][-1] == "local_steps=2" and fewer["seconds"] <= 30 * seconds
    none = proposals("kilotune", Budget(memory=1000), "basis.size=64", "local_steps=1")
    assert not none["fits"]
    assert none["exceeds"][0]["exceeds"][0].startswith("memory: ")
    assert none["exceeds"][0]["exceeds"][0].endswith("allowed 1.0 kB")
