"""Low-bit LoRA: what it computes with is what it sends, and its gradients are those of the straight-through formula."""

import pytest
import torch
from torch import nn

from kilotune.codec.gaussian import Gaussian
from kilotune.core.errors import RecipeError
from kilotune.core.levels import gaussian_levels
from kilotune.core.rng import stream
from kilotune.core.types import TensorUpdate, WireContext
from kilotune.engine.composing.compose import compose
from kilotune.engine.model.loss import answer_loss
from kilotune.engine.training.step import BatchObjective, Memory, train_step
from kilotune.estimator.backprop import Backprop
from kilotune.optimizer.adamw import AdamW
from kilotune.parametrization._direct import DirectTrainable
from kilotune.parametrization.low_bit_lora import EPS, LowBitLora, LowBitTrainable
from tiny import tiny_batch, tiny_llama

RANK = 4


def attached(bits: int = 1) -> LowBitTrainable:
    return LowBitLora(bits=bits, rank=RANK).attach(tiny_llama(), basis=None, seed=3)


def train(trainable, steps: int, rows: int = 4) -> float:
    """The loss on a batch after so many steps on it."""
    memory, batch = Memory.empty(), tiny_batch(1, rows=rows)
    trainable.begin(1)
    for step in range(steps):
        objective = BatchObjective(trainable.model, [batch])
        train_step(trainable, Backprop(), AdamW(lr=5e-3), objective, memory, 1.0, stream(0, step))
    return float(answer_loss(trainable.model, batch))


@pytest.mark.parametrize("bits", [1, 2])
def test_the_model_computes_with_as_many_values_as_the_bits_say(bits):
    """Kills: latent factors in the forward pass; levels of all factors together."""
    trainable = attached(bits)
    train(trainable, 3)
    assert {len(param.data.unique()) for param in trainable.params.values()} == {2**bits}
    assert all(len(latent.unique()) > 2**bits for latent in trainable.wire.values())


@pytest.mark.parametrize("bits", [1, 3])
def test_gradients_are_those_of_the_straight_through_formula(bits):
    """Against autograd in float64, with levels as constants on the way forward and the identity on the way back.

    Kills: gradients that ignore the mean or the deviation; a deviation of n - 1; eps in one place only."""
    latent = torch.tensor([[3e-5, -2e-5], [1e-5, 4e-5]])  # small, so that eps counts
    trainable = LowBitTrainable(nn.Module(), {"x": nn.Parameter(latent.clone(), requires_grad=False)}, bits)
    upstream, got = torch.tensor([[0.3, -1.0], [2.0, 0.7]]), {}
    trainable.pull("x", upstream, lambda name, gradient, start=0: got.update({name: gradient}))

    v = latent.double().requires_grad_(True)
    mean, deviation = v.mean(), v.std(correction=0)
    unit = (v - mean) / (deviation + EPS)
    levels = torch.from_numpy(gaussian_levels(bits).copy())
    level = levels[(unit.detach()[..., None] - levels).abs().argmin(-1)] + unit - unit.detach()
    factor = mean + deviation * level
    torch.testing.assert_close(trainable.params["x"].data.double(), factor.detach(), atol=0, rtol=1e-5)
    (upstream.double() * factor).sum().backward()
    torch.testing.assert_close(got["x"].double(), v.grad, atol=0, rtol=1e-4)
    assert v.grad.abs().min() > 1e-3


@pytest.mark.parametrize("bits", [1, 4])
def test_a_replica_that_reads_the_payload_computes_the_same(bits):
    """Kills: latent factors on the wire; a deviation that shrinks with every round trip; a mean that is lost."""
    here, there, wire = attached(bits), attached(bits), Gaussian(bits=bits)
    train(here, 3)
    update = here.update()
    context = WireContext(1, 0, here.shapes())
    payload = wire.encode(update, context, {})
    sizes = [value.numel() for value in update.tensors.values()]
    assert len(payload) == 22 + 8 * len(sizes) + -(-bits * sum(sizes) // 8)
    for _ in range(3):  # taken over, sent on and taken over again
        there.apply(wire.decode(payload, context).tensors.items(), 1)
        payload = wire.encode(TensorUpdate({n: p.data for n, p in there.params.items()}), context, {})
    ids = tiny_batch(9).input_ids
    with torch.no_grad():
        torch.testing.assert_close(there.model(ids).logits, here.model(ids).logits, atol=1e-5, rtol=1e-5)


def test_what_clients_disagree_on_becomes_the_nearest_two_values():
    """Kills: the mean of factors as latent factors, whose levels are a third too small."""
    trainable, name = attached(), "model"
    rng = stream(0, "factors")
    shapes = trainable.shapes()
    mean = {n: torch.from_numpy(rng.choice([-2.0, -1.0, 1.0, 2.0], shape)).float() + 0.1 for n, shape in shapes.items()}
    trainable.apply(mean.items(), 1)
    for name, values in mean.items():
        above = values > values.mean()
        expected = torch.where(above, values[above].mean(), values[~above].mean())
        torch.testing.assert_close(trainable.params[name].data, expected, atol=1e-5, rtol=1e-5)


def test_eight_bits_train_as_whole_numbers_do():
    """Within 1 % of the loss that the same factors reach in float32, from the same start.

    Kills: levels that are too few or too coarse; gradients scaled by the number of levels."""
    whole = attached(8)
    plain = DirectTrainable(whole.model, whole.params)
    eight, start = attached(8), float(answer_loss(whole.model, tiny_batch(1, rows=4)))
    after = train(plain, 12)
    assert after < start - 0.05
    assert train(eight, 12) == pytest.approx(after, rel=0.01)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("uplink={name: topk, density: 0.1}", "Use uplink: dense."),
        ("server_optimizer={name: adaptive, lr: 1.0e-2}", "would scale the tensors"),
        ("optimizer={name: scaffold, lr: 0.1}", "sends more than where training ended"),
        ("streaming={overlap: 1, mixing: 0.5}", "streaming mixes weights of two rounds"),
        ("defences.gate=0.1", "Use --set defences.gate=null."),
        ("privacy={name: central, clients: 100, clip: 1.0, epsilon: 8.0}", "Use parametrization: lora_sb"),
    ],
)
def test_what_takes_tensors_for_changes_is_refused(assignment, message):
    with pytest.raises(RecipeError, match=message):
        compose("one_bit_adapters", "federate", [assignment])
