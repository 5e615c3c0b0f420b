"""Laws of every estimator, and the card's proofs of the two-point one."""

import numpy as np
import pytest
import torch
from torch import nn

from kilotune.basis.seeds import Seeds
from kilotune.basis.tiled import Tiled
from kilotune.core.noise import noise
from kilotune.core.registry import find, names
from kilotune.core.rng import stream
from kilotune.engine.model.loss import answer_loss
from kilotune.engine.rounds.worker import pairs
from kilotune.engine.training.step import BatchObjective, Memory, train_step
from kilotune.estimator import Objective
from kilotune.estimator.backprop import Backprop
from kilotune.estimator.zeroth_order import ZerothOrder
from kilotune.optimizer.adamw import AdamW
from kilotune.optimizer.sgd import SGD
from kilotune.parametrization.full import Full
from kilotune.parametrization.subspace import Subspace
from tiny import tiny_batch, tiny_llama


class Quadratic(nn.Module):
    """L = ½ Σ h (w - target)², with a known gradient and a known trace."""

    def __init__(self, size: int = 50) -> None:
        super().__init__()
        rng = stream(0, "quadratic")
        self.w = nn.Parameter(torch.from_numpy(rng.standard_normal(size)).float(), requires_grad=False)
        self.target = torch.from_numpy(rng.standard_normal(size)).float()
        self.h = torch.from_numpy(rng.random(size)).float() + 0.5

    def forward(self) -> torch.Tensor:
        return 0.5 * (self.h * (self.w - self.target).square()).sum()

    def gradient(self) -> torch.Tensor:
        return self.h * (self.w.data - self.target)


class Whole(Objective):
    def __init__(self, model):
        self.model = model

    def parts(self):
        return [lambda: self.model()]


def estimate(estimator, model, trainable, rng, state=None):
    got = {}
    result = estimator.estimate(
        Whole(model), trainable, rng, {} if state is None else state, lambda n, g: got.update({n: g.clone()})
    )
    return got, result


@pytest.mark.parametrize("name", names("estimator"))
def test_hundreds_of_estimates_without_a_step_leave_every_bit(name):
    """Kills: restoring by adding back, which drifts."""
    model = Quadratic()
    trainable = Full().attach(model, basis=None, seed=0)
    before = model.w.data.clone()
    estimator = find("estimator", name)()
    for step in range(300):
        estimate(estimator, model, trainable, stream(1, "x", step))
    assert torch.equal(model.w.data, before)


@pytest.mark.parametrize("name", names("estimator"))
def test_the_mean_estimate_is_the_gradient(name):
    """Kills: a factor 2, a missing epsilon, noise that is not of unit variance. 4 sigma of 1,000 draws."""
    model = Quadratic()
    trainable = Full().attach(model, basis=None, seed=0)
    estimator = find("estimator", name)()
    count = 1000 if estimator.forward_only else 2
    total = torch.zeros(50, dtype=torch.float64)
    for step in range(count):
        total += estimate(estimator, model, trainable, stream(2, "x", step))[0]["w"].double()
    gradient = model.gradient().double()
    sigma = gradient.norm() / count**0.5 if estimator.forward_only else torch.tensor(1e-6)
    assert (total / count - gradient).abs().max() < 4 * sigma + 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_the_slope_is_the_directional_derivative_of_backprop(seed):
    """Kills: a wrong overlay (a tensor left out, a tied tensor moved twice), one-sided differences."""
    model, batch = tiny_llama(seed).double(), tiny_batch(seed)
    # float64 needs float64 noise in the overlay, so the model stays float32 and the bound carries its rounding
    model = model.float()
    trainable = Full().attach(model, basis=None, seed=0)
    objective = BatchObjective(model, [batch])
    rng = stream(seed, "probe")
    result = ZerothOrder(epsilon=1e-3).estimate(objective, trainable, rng, {}, lambda n, g: None)
    model.requires_grad_(True)
    answer_loss(model, batch).backward()
    expected = 0.0
    for name, param in model.named_parameters():
        z = torch.from_numpy(noise("sign", result.index, 0, name, 0, param.numel())).view(param.shape)
        expected += float((z.double() * param.grad.double()).sum())
    assert result.slope == pytest.approx(expected, rel=0.05, abs=0.02)


@pytest.mark.parametrize("basis", [Tiled(size=64), Seeds(size=16), Seeds(size=16, law="sign", scale="rms")])
def test_a_client_ends_where_the_rebuild_from_its_pairs_ends(basis):
    """FedKSeed proof 1. Kills: a log that is not what was applied; a step whose rate the log does not hold."""
    model = tiny_llama(1)
    trainable = Subspace().attach(model, basis=basis, seed=0)
    base = {n: p.data.clone() for n, p in trainable.params.items()}
    trainable.begin(5)  # without the promise of forward passes only, so that the weights themselves move
    memory, steps, count = Memory.empty(), [], 6
    for step in range(count):
        objective = BatchObjective(model, [tiny_batch(step)])
        rng = stream(0, "z", step)
        steps.append(train_step(trainable, ZerothOrder(), SGD(lr=1e-3), objective, memory, 1.0, rng))
    own = {n: p.data.clone() for n, p in trainable.params.items()}
    trainable.rollback()
    assert all(torch.equal(p.data, base[n]) for n, p in trainable.params.items())
    trainable.apply([("coords", basis.coordinates(pairs(steps)))], 5)
    moved = torch.cat([(own[n] - base[n]).flatten() for n in base])
    rebuilt = torch.cat([(p.data - base[n]).flatten() for n, p in trainable.params.items()])
    weights = torch.cat([w.flatten() for w in base.values()])
    rounding = count * 2**-24 * weights.norm()  # half a unit in the last place a step
    assert moved.norm() > 1000 * rounding
    assert (moved - rebuilt).norm() <= 2 * rounding


def test_overlay_and_moved_weights_see_the_same_losses():
    """Kills: local steps that the overlay forgets."""
    losses = []
    for forward_only in (False, True):
        model = tiny_llama(1)
        trainable = Subspace().attach(model, basis=Tiled(size=64), seed=0)
        trainable.begin(5, forward_only)
        memory = Memory.empty()
        for step in range(6):
            objective = BatchObjective(model, [tiny_batch(step)])
            report = train_step(trainable, ZerothOrder(), SGD(lr=1e-3), objective, memory, 1.0, stream(0, "z", step))
            losses.append(report.loss)
    np.testing.assert_allclose(losses[:6], losses[6:], rtol=1e-5)


def test_forward_only_steps_on_a_one_pass_basis_write_no_weight_and_copy_none():
    """Kills: an anchor, which would double the memory of a client that can only run forward."""
    model = tiny_llama(1)
    trainable = Subspace().attach(model, basis=Tiled(size=64), seed=0)
    trainable.begin(5, forward_only=True)
    pointers = {n: (p.data_ptr(), p.data.clone()) for n, p in trainable.params.items()}
    objective = BatchObjective(model, [tiny_batch(0)])
    train_step(trainable, ZerothOrder(), SGD(lr=1e-3), objective, Memory.empty(), 1.0, stream(0, "z"))
    assert trainable.wire["coords"].any()
    assert trainable._anchor == {}
    for name, param in trainable.params.items():
        assert param.data_ptr() == pointers[name][0]
        assert torch.equal(param.data, pointers[name][1])


def test_a_measured_rate_is_a_tenth_of_the_inverse_trace_and_descends():
    """Kills: a rate from a flat or wrongly scaled second difference."""
    model = Quadratic()
    trainable = Full().attach(model, basis=None, seed=0)
    estimator, optimizer, memory = ZerothOrder(epsilon=1e-1, clip=3.0), SGD(lr="auto"), Memory.empty()
    before = float(model())
    for step in range(100):
        train_step(trainable, estimator, optimizer, Whole(model), memory, 1.0, stream(0, "a", step))
    lr = estimator.suggested_lr(memory.estimator)
    assert lr == pytest.approx(0.1 / float(model.h.sum()), rel=0.5)
    assert float(model()) < 0.85 * before


def test_a_loss_that_is_not_finite_moves_nothing():
    """Kills: a NaN slope that poisons the weights."""
    model = Quadratic()
    trainable = Full().attach(model, basis=None, seed=0)
    model.target[3] = float("nan")
    before = model.w.data.clone()
    report = train_step(trainable, ZerothOrder(), SGD(lr=1e-2), Whole(model), Memory.empty(), 1.0, stream(0))
    assert torch.equal(model.w.data, before)
    assert report.index is None


def test_backprop_never_holds_two_gradients_of_the_model():
    """Kills: collecting all gradients before the first is used. At each push only its own tensor has one."""
    model, batch = tiny_llama(1), tiny_batch(0)
    trainable = Full().attach(model, basis=None, seed=0)
    held = []

    def sink(name, gradient):
        held.append(sum(p.grad is not None for p in model.parameters()))

    Backprop().estimate(BatchObjective(model, [batch]), trainable, stream(0), {}, sink)
    assert len(held) == len(trainable.sources())
    assert max(held) <= 1  # the tied head's share may wait in .grad for the embedding's


@pytest.mark.parametrize("rule", [SGD(lr=1e-3, weight_decay=0.1), SGD(lr=1e-3, momentum=0.5), AdamW(lr=1e-3)])
def test_steps_do_not_depend_on_the_parts_a_slope_comes_in(rule, monkeypatch):
    """Kills: parts at the wrong place; a rule with memory that takes each part for a tensor of its own."""
    ends = []
    for block in (1 << 20, 100):
        monkeypatch.setattr("kilotune.parametrization._direct.BLOCK", block)
        trainable, memory = Full().attach(tiny_llama(1), basis=None, seed=0), Memory.empty()
        for step in range(2):
            objective = BatchObjective(trainable.model, [tiny_batch(step)])
            train_step(trainable, ZerothOrder(), rule, objective, memory, 1.0, stream(0, "z", step))
        ends.append({name: value.clone() for name, value in trainable.wire.items()})
    whole, parts = ends
    assert any(value.numel() > 100 and value.numel() % 100 for value in whole.values())
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    assert not any(torch.equal(whole[name], param.data) for name, param in tiny_llama(1).named_parameters())
