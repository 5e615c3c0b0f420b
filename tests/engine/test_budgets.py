"""FedPipe: which matrices are worth training is found, no plan goes beyond its budget, and clients count where they
trained."""

import re

import numpy as np
import pytest
import torch

from federating import plan
from kilotune.aggregation.holders import Holders
from kilotune.codec import TensorUpdate, WireContext
from kilotune.codec.pair_ranks import PairRanks
from kilotune.core.errors import IncompatibleError, RecipeError
from kilotune.core.factors import factor_pairs
from kilotune.core.rng import stream
from kilotune.engine.planning.budgets import Allowance, Costs, groups, matrix_of, portion, sides_of, triplet_worths
from kilotune.engine.training.step import BatchObjective, Memory, train_step
from kilotune.estimator import Objective
from kilotune.estimator.backprop import Backprop
from kilotune.optimizer.adamw import AdamW
from kilotune.parametrization.lora_svd import LoraSvd
from tiny import tiny_batch, tiny_llama

STRONG, WEAK = "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.up_proj"
SOME = {"q_proj": 2, "layers.1.mlp.down_proj": 3}


class Apart(Objective):
    """Every adapted layer has inputs and targets of its own; for all but two these are the base's answers."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._layers = {n.split(".", 2)[-1]: m for n, m in model.named_modules() if hasattr(m, "lora_A")}

    def parts(self):
        return [self._loss]

    def _loss(self) -> torch.Tensor:
        total = torch.zeros(())
        for name, layer in self._layers.items():
            rng, weight = stream(0, "apart", name), layer.base_layer.weight
            x = torch.from_numpy(rng.normal(size=(6, weight.shape[1]))).float()
            wanted = torch.nn.functional.linear(x, weight)
            off = {STRONG: 1.0, WEAK: 0.1}.get(name, 0.0)
            wanted = wanted + off * torch.from_numpy(rng.normal(size=wanted.shape)).float()
            total = total + (layer(x) - wanted).square().mean()
        return total


def test_a_planted_matrix_is_worth_most_and_those_at_their_optimum_nothing():
    """Kills: worth without the gradient, or without the weight; worth given to another matrix."""
    trainable = LoraSvd(rank=3).attach(tiny_llama(), basis=None, seed=3)
    trainable.begin(5)
    worths = triplet_worths(trainable, Backprop(), AdamW(lr=1e-2), [Apart(trainable.model)] * 4)
    totals = {name: sum(each) for name, each in worths.items()}
    assert len(totals) == 14
    assert sorted(totals, key=totals.__getitem__)[-2:] == [WEAK, STRONG]
    assert sorted(totals.values())[:-2] == [0.0] * 12
    assert all(each == sorted(each, reverse=True) and len(each) == 3 for each in worths.values())


def drawn(seed: int) -> tuple[Costs, dict[str, list[float]]]:
    rng = stream(seed, "costs")
    names = [f"layers.{i}.w" for i in range(int(rng.integers(1, 8)))]
    sides = {name: int(rng.integers(4, 60)) for name in names}
    fixed = {
        (batch, precision): (float(rng.integers(1000, 4000) + 100 * batch), batch * float(rng.uniform(0.5, 2)))
        for batch in (2, 4, 8)
        for precision in ("fp32", "bf16")
    }
    worths = {name: sorted(rng.exponential(size=4).tolist(), reverse=True) for name in names}
    return Costs(fixed, sides, 4, 2), worths


@pytest.mark.parametrize("seed", range(12))
def test_no_portion_goes_beyond_its_budget_and_one_is_refused_only_if_nothing_fits(seed):
    """Recounted from the parts. Kills: memory of moments or gradients forgotten; the time of another batch size."""
    costs, worths = drawn(seed)
    whole = 4 * 2 * 4 * sum(costs.sides.values())
    for turn in range(6):
        rng = stream(seed, "allowance", turn)
        allowance = Allowance(whole + float(rng.integers(800, 12000)), float(rng.uniform(0.5, 20)))
        try:
            found = portion(costs, worths, allowance)
        except RecipeError:
            least = [m + whole for m, s in costs.fixed.values() if s <= allowance.seconds]
            assert not least or min(least) + 4 * 5 * min(costs.sides.values()) > allowance.memory
            continue
        memory, seconds = costs.fixed[found.batch_size, found.precision]
        trained = sum(rank * costs.sides[name] for name, rank in found.ranks.items())
        assert memory + whole + 4 * (3 + 2) * trained <= allowance.memory
        assert seconds <= allowance.seconds
        assert all(1 <= rank <= 4 for rank in found.ranks.values())
        assert 0 < found.share <= 1


def test_with_room_for_everything_everything_is_trained_on_the_largest_batch_in_float32():
    """Kills: a choice of the first plan that fits; precision given away for nothing."""
    costs, worths = drawn(3)
    (group,) = groups(costs, worths, [(0.5, Allowance(1e9, 1e9))])
    assert group == {"share": 0.5, "ranks": dict.fromkeys(costs.sides, 4), "batch_size": 8, "precision": "fp32"}
    with pytest.raises(RecipeError, match="got 'nf4', expected one of fp32, bf16"):
        portion(Costs({(2, "nf4"): (1.0, 1.0)}, costs.sides, 4, 2), worths, Allowance(1e9, 1e9))


def portioned(ranks, steps: int = 2):
    """A client in the middle of a round, and what its optimizer remembers."""
    trainable, memory = LoraSvd(rank=4, ranks=ranks, scale=2.0).attach(tiny_llama(), basis=None, seed=3), Memory.empty()
    trainable.begin(11)
    LoraSvd(rank=4, ranks=ranks).narrow(trainable)
    for step in range(steps):
        objective = BatchObjective(trainable.model, [tiny_batch(1)])
        train_step(trainable, Backprop(), AdamW(lr=1e-2), objective, memory, 1.0, stream(0, "t", step))
    return trainable, memory


@pytest.mark.parametrize("ranks", [SOME, {}], ids=["some", "all"])
def test_predicted_adapter_memory_bounds_a_plain_recount(ranks):
    """Every tensor that is alive in a round, each piece of memory once, and the gradients.

    Kills: P, the start of the round, or one of the moments left out of the model.
    """
    trainable, memory = portioned(ranks)
    sides = sides_of({name: int(np.prod(shape)) for name, shape in trainable.shapes().items()}, 4)
    trained = dict.fromkeys(sides, 4) if not ranks else {n: r for n in sides for part, r in ranks.items() if part in n}
    predicted = Costs({}, sides, 4, AdamW().copies).adapters(trained)
    moments = [state[key] for state in memory.optimizer.values() for key in ("m", "v")]
    alive = [*trainable.wire.values(), *trainable._whole.values(), *trainable._anchor.values(), *moments]
    alive += [param.data for param in trainable.params.values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive if t.numel()}
    gradients = 4 * sum(param.numel() for param in trainable.sources().values())
    recount = sum(storages.values()) + gradients
    assert 4 * sum(rank * sides[name] for name, rank in trained.items()) == gradients
    assert recount <= predicted <= 1.35 * recount


def test_a_client_trains_and_sends_its_matrices_alone():
    """Kills: components of matrices that a machine has no room for; a rank of one matrix given to another."""
    client, _ = portioned(SOME)
    server = LoraSvd(rank=4, scale=2.0).attach(tiny_llama(), basis=None, seed=3)
    context, codec = WireContext(1, 11, client.shapes()), PairRanks(values={"name": "dense", "dtype": "fp32"})
    payload = codec.encode(client.update(), context, {})
    sent = codec.decode(payload, context).tensors
    numel = {n: t.numel() for n, t in client.update().tensors.items()}
    assert len(payload) == codec.predict_bytes(numel, 0)
    for b, a in factor_pairs(sent):
        name = matrix_of(a)
        rank = 2 if name.endswith("q_proj") else 3 if name.endswith("1.mlp.down_proj") else 0
        assert [bool(row.any()) for row in sent[a]] == [k < rank for k in range(4)]
        assert torch.equal(sent[b][:, :rank], client.update().tensors[b])
    server.apply(sent.items(), 11)
    weights = dict(tiny_llama().named_parameters())
    for name, value in server.state().items():
        same = torch.equal(value, weights[name.split(".", 2)[-1]])
        assert same != ("q_proj" in name or "1.mlp.down_proj" in name), name
    client.rollback()
    assert not any(change.any() for change in client.update().tensors.values())
    with pytest.raises(RecipeError, match=r"clients.ranks: 'q_prj' matched none of \d+ tensors. Did you mean 'q_proj'"):
        portioned({"q_prj": 2})


def test_a_pair_counts_by_the_weight_of_those_that_hold_it_and_what_nobody_trained_is_zero():
    """Kills: division by the weight of all clients; a client without the pair taken for a vote on zero."""
    rng, shapes = stream(0, "holders"), {"x.lora_A.w": (4, 9), "x.lora_B.w": (7, 4), "y.lora_A.w": (4, 5)}
    shapes |= {"y.lora_B.w": (6, 4), "z.lora_A.w": (4, 5), "z.lora_B.w": (5, 4)}
    ranks = [{"x": 2, "y": 1}, {"x": 1}, {"y": 2}]
    clients = []
    for held in ranks:
        tensors = {n: torch.from_numpy(rng.normal(size=shape)).float() for n, shape in shapes.items()}
        for name, tensor in tensors.items():
            tensor.narrow(0 if "A" in name else 1, held.get(name[0], 0), 4 - held.get(name[0], 0)).zero_()
        clients.append(TensorUpdate(tensors))
    weights = np.array([0.5, 0.2, 0.3])
    combined = Holders().combine(clients, weights, {}).tensors
    for name in "xyz":
        b, a = f"{name}.lora_B.w", f"{name}.lora_A.w"
        held = [at for at, rank in enumerate(ranks) if name in rank]
        parts = [weights[at] * clients[at].tensors[b].double() @ clients[at].tensors[a].double() for at in held]
        expected = sum(parts) / weights[held].sum() if held else torch.zeros(5, 5).double()
        torch.testing.assert_close(combined[b].double() @ combined[a].double(), expected, atol=1e-5, rtol=1e-5)
    assert not combined["z.lora_A.w"].any()


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("fedpipe", ["parametrization={name: lora_pairs}"], "Use parametrization: lora_svd"),
        (
            "fedpipe",
            ["parametrization={name: lora_merged}", "estimator={name: zeroth_order}"],
            "probes all factors of parametrization 'lora_merged'",
        ),
        ("fedpipe", ["uplink={name: low_rank}"], "Use uplink: pair_ranks"),
        ("flora", ["downlink={name: pair_ranks}"], "Use downlink: low_rank"),
        ("fedpipe", ["aggregation={name: lora_fair}"], "Use aggregation: holders"),
        ("fedpipe", ["clients=[{share: 1, ranks: {q_proj: 9}}]"], "ranks of at most parametrization.rank = 8"),
        ("fedavg_lora", ["clients=[{share: 1, ranks: {q_proj: 2}}]"], "Use parametrization: lora_svd"),
    ],
)
def test_portions_that_do_not_fit_the_rest_are_refused(base, data, recipe, changes, message):
    with pytest.raises((IncompatibleError, RecipeError), match=re.escape(message)):
        plan(base, data, recipe, *changes)
