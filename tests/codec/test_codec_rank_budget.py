"""Rank budget: no payload beyond its budget, more with a better channel, and of every pair what is worth most."""

import math

import numpy as np
import pytest
import torch

from federating import plan
from kilotune.codec import TensorUpdate, WireContext, WireError
from kilotune.codec.quantized import Quantized
from kilotune.codec.rank_budget import RankBudget
from kilotune.core.errors import IncompatibleError
from kilotune.core.factors import factor_pairs, used_rank
from kilotune.core.rng import stream
from kilotune.engine.model.loss import answer_loss
from kilotune.engine.planning.budgets import matrix_of
from kilotune.engine.training.step import BatchObjective, Memory, train_step
from kilotune.estimator.backprop import Backprop
from kilotune.optimizer.adamw import AdamW
from kilotune.parametrization.lora_svd import LoraSvd, LoraSvdTrainable
from tiny import tiny_batch, tiny_llama

SHAPES = {"x.lora_A.w": (4, 5), "x.lora_B.w": (3, 4), "y.lora_A.w": (4, 20), "y.lora_B.w": (30, 4)}
CONTEXT = WireContext(1, 5, SHAPES)
METHOD = LoraSvd(rank=4, scale=2.0)
EXACT = RankBudget(values={"name": "dense", "dtype": "fp32"})


def trained() -> LoraSvdTrainable:
    """After some steps of a round."""
    client, memory = METHOD.attach(tiny_llama(), basis=None, seed=3), Memory.empty()
    client.begin(11)
    for name, value in client.wire.items():
        if "lora_A" in name:
            torch.testing.assert_close(value @ value.T, torch.eye(4), atol=1e-5, rtol=0)
    for step in range(4):
        objective = BatchObjective(client.model, [tiny_batch(1)])
        train_step(client, Backprop(), AdamW(lr=1e-2), objective, memory, 1.0, stream(0, "t", step))
    return client


def update(seed: int) -> TensorUpdate:
    rng = stream(seed, "update")
    drawn = {
        name: rng.normal(size=shape) * rng.lognormal(size=4)[:, None] for name, shape in SHAPES.items() if "A" in name
    }
    drawn |= {name: rng.normal(size=shape) * rng.lognormal(size=4) for name, shape in SHAPES.items() if "B" in name}
    return TensorUpdate({name: torch.from_numpy(value.astype(np.float32)) for name, value in drawn.items()})


def products(tensors) -> dict[str, torch.Tensor]:
    return {a: tensors[b].double() @ tensors[a].double() for b, a in factor_pairs(tensors)}


def ranks(tensors) -> dict[str, int]:
    return {a: int(tensors[a].ne(0).any(1).sum()) for _, a in factor_pairs(tensors)}


def test_the_payload_is_the_one_that_the_wire_page_shows():
    """Kills: counts of another width or order; a kept component that stays where it was."""
    sent = TensorUpdate(
        {"x.lora_A.w": torch.tensor([[1.0, 0.0], [0.0, -2.0]]), "x.lora_B.w": torch.tensor([[0.5, 4.0]])}
    )
    context = WireContext(1, 5, {name: tuple(t.shape) for name, t in sent.tensors.items()})
    payload = RankBudget().encode_within(33, sent, context)
    head = "50524b31" + "82801a6f" + "0100"
    assert payload.hex() == head + "444e533101" + "0adf5d58" + "0300000000000000" + "000000c00044"
    assert RankBudget().decode(payload, context).tensors["x.lora_B.w"].tolist() == [[4, 0]]


@pytest.mark.parametrize("codec", [EXACT, RankBudget(values=Quantized(bits=4))], ids=["dense", "quantized"])
def test_no_payload_is_longer_than_its_budget_and_more_bytes_keep_more(codec):
    """Every number of bytes from nothing to all; a beginning of one order, so what fits stays.

    Kills: a header that is not counted; a greedy choice that takes a large component in place of several small ones.
    """
    sent = update(0)
    whole = codec.predict_bytes({name: math.prod(shape) for name, shape in SHAPES.items()}, 0)
    nothing = TensorUpdate({name: 0 * tensor for name, tensor in sent.tensors.items()})
    least, before = len(codec.encode_within(whole, nothing, CONTEXT)), np.zeros(2)
    for most in [*range(least, whole, 37), whole]:
        payload = codec.encode_within(most, sent, CONTEXT)
        kept = np.frombuffer(payload, "<u2", 2, 8)
        assert len(payload) <= most
        assert (kept >= before).all()
        before = kept
    assert len(payload) == whole
    assert before.tolist() == [4, 4]
    with pytest.raises(WireError, match="too poor"):
        codec.encode_within(least - 1, sent, CONTEXT)


def test_sent_bytes_stay_within_the_channels_budget_at_every_snr():
    """Kills: bits taken for bytes; SNR as a ratio instead of decibels; a draw that is not the sender's own."""
    codec = RankBudget(bandwidth=600.0)
    budgets = [codec.budget(snr) for snr in codec.snr]
    assert budgets == [math.floor(600 * math.log2(1 + r) / 8) for r in (10**-0.5, 1.0, 10**0.5, 10.0, 10**1.5)]
    seen = {}
    for sender in range(40):
        context = WireContext(1, 5, SHAPES, sender=sender)
        payload = codec.encode(update(0), context, {}) if codec.momentary(context) > 0 else b""
        assert len(payload) <= codec.budget(codec.momentary(context))
        seen[codec.momentary(context)] = len(payload)
    assert sorted(seen) == [-5, 0, 5, 10, 15]
    assert seen[5] < seen[10] < seen[15]


def test_what_travels_is_worth_most_per_number_and_decodes_to_the_same_products():
    """Components of y change more than those of x, and cost six times as much.

    Kills: worth not divided by size; |e| without the vectors' norms; components of B and A that no longer match.
    """
    sent, counts = update(1), []
    for b, a in factor_pairs(SHAPES):
        norms = sent.tensors[b].norm(dim=0) * sent.tensors[a].norm(dim=1)
        sent.tensors[b] *= torch.tensor([2.0, 6.0, 8.0, 4.0]).add(float(a[0] == "y")) / norms
    order = [("x", k) for k in (2, 1, 3, 0)] + [("y", k) for k in (2, 1, 3, 0)]
    for most in (90, 300, 600, 800):
        got = EXACT.decode(EXACT.encode_within(most, sent, CONTEXT), CONTEXT).tensors
        counts.append(sum(ranks(got).values()))
        for b, a in factor_pairs(SHAPES):
            kept = [k for name, k in order[: counts[-1]] if name == a[0]]
            expected = sent.tensors[b][:, kept].double() @ sent.tensors[a][kept].double()
            torch.testing.assert_close(products(got)[a], expected, atol=1e-6, rtol=1e-6)
    assert counts == [1, 4, 6, 7]


def test_counts_beyond_the_rank_are_refused():
    payload = bytearray(EXACT.encode_within(400, update(1), CONTEXT))
    payload[8] = 5
    with pytest.raises(WireError, match="more components than a pair has"):
        EXACT.decode(bytes(payload), CONTEXT)


def test_gradients_of_the_directions_are_those_of_the_merged_weight():
    """With W = W_0 + s P diag(e) Q and G its gradient: s G Qᵀ diag(e), s diag(Pᵀ G Qᵀ) and s diag(e) Pᵀ G.

    Kills: gradients of B taken for those of P; a move of one that the gradient of another already sees.
    """
    client, full = trained(), tiny_llama()
    for b, a in factor_pairs(client.params):
        weight = full.get_parameter(matrix_of(a) + ".weight")
        weight.data += 2.0 * client.params[b].data @ client.params[a].data
    full.requires_grad_(True)
    answer_loss(full, tiny_batch(4)).backward()
    start, got = {name: value.clone() for name, value in client.wire.items()}, {}

    def sink(name: str, gradient: torch.Tensor, start: int = 0, /) -> None:
        got[name] = gradient.clone()
        client.move(name, torch.full_like(gradient, 0.1))

    objective = BatchObjective(client.model, [tiny_batch(4)])
    Backprop().estimate(objective, client, stream(0), {}, sink)
    assert len(got) == 3 * 14
    for a in (name for name in start if "lora_A" in name):
        place = a.partition(".lora_A.")[0]
        p, e, q = (start[name] for name in (f"{place}.lora_P", f"{place}.lora_E", a))
        g = 2.0 * full.get_parameter(matrix_of(a) + ".weight").grad
        torch.testing.assert_close(got[f"{place}.lora_P"], g @ q.T * e, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(got[f"{place}.lora_E"], (p.T @ g @ q.T).diagonal(), atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(got[a], e[:, None] * (p.T @ g), atol=1e-5, rtol=1e-3)


def test_a_masked_rank_computes_what_the_truncated_adapter_does():
    """Train P, e and Q, send some, merge: the logits are those of the adapter with e = 0 where nothing was sent.

    Kills: e counted twice; another direction left out than the one masked; a merge of what was not sent.
    """
    client, server = trained(), METHOD.attach(tiny_llama(), basis=None, seed=3)
    context = WireContext(1, 11, client.shapes())
    sent = client.update()
    got = EXACT.decode(EXACT.encode_within(6000, sent, context), context)
    total = sum(ranks(got.tensors).values())
    assert 5 < total < 50
    assert used_rank(got.tensors) <= 4
    for b, a in factor_pairs(sent.tensors):
        norms = sent.tensors[b].norm(dim=0) * sent.tensors[a].norm(dim=1)
        weakest = norms.argsort()[: 4 - ranks(got.tensors)[a]]
        e = a.partition(".lora_A.")[0] + ".lora_E"
        client.move(e, -client.wire[e] * torch.zeros(4).index_fill(0, weakest, 1.0))
    server.apply(got.tensors.items(), 11)
    weights = dict(tiny_llama().named_parameters())
    for name, merged in server.state().items():
        a = name.replace(".weight", ".lora_A.default.weight")
        b = a.replace("lora_A", "lora_B")
        product = client.params[b].data.double() @ client.params[a].data.double()
        start = weights[name.split(".", 2)[-1]].double()
        torch.testing.assert_close(merged.double(), start + 2.0 * product, atol=1e-6, rtol=0)
    batch = tiny_batch(5)
    one, other, base = (answer_loss(model, batch) for model in (client.model, server.model, tiny_llama()))
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    assert abs(float(one - base)) > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["downlink={name: rank_budget}"], "Use downlink: low_rank"),
        (["parametrization={name: lora_pairs}"], "Use parametrization: lora_svd"),
        (["aggregation={name: lora_fair}"], "Use aggregation: flex_lora"),
    ],
)
def test_parts_that_do_not_fit_a_channel_are_refused(base, data, changes, message):
    with pytest.raises(IncompatibleError, match=message):
        plan(base, data, "airllm", *changes)
