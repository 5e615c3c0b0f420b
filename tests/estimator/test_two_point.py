"""The two-point estimate against its formula, whichever way a trainable looks at both sides."""

import torch

from kilotune.basis.tiled import Tiled
from kilotune.core.noise import noise
from kilotune.core.rng import stream
from kilotune.core.trainable import Direction, Trainable
from kilotune.engine.training.step import BatchObjective
from kilotune.estimator.zeroth_order import ZerothOrder
from kilotune.parametrization.full import Full
from kilotune.parametrization.subspace import Subspace
from tiny import tiny_batch, tiny_llama


class OneSided:
    """A trainable with `perturbed` alone, which looks at both sides as the contract does by default."""

    both = Trainable.both

    def __init__(self, inner) -> None:
        self.draw, self.perturbed, self.slope = inner.draw, inner.perturbed, inner.slope


def test_the_estimate_is_the_same_when_a_trainable_shows_one_side_at_a_time():
    """Kills: sides that are swapped; an estimate that differs between trainables."""
    trainable = Subspace().attach(tiny_llama(1), basis=Tiled(size=64), seed=0)
    trainable.begin(5, forward_only=True)
    trainable.move("coords", torch.linspace(-1e-3, 1e-3, 64))
    objective = BatchObjective(trainable.model, [tiny_batch(0), tiny_batch(1)])
    seen, states = [], []
    for one in (trainable, OneSided(trainable)):
        states.append({"measure": torch.tensor(1)})
        pushed = []
        estimate = ZerothOrder(epsilon=1e-2).estimate(
            objective, one, stream(0, "x"), states[-1], lambda name, g, pushed=pushed: pushed.append((name, g.clone()))
        )
        seen.append((estimate, pushed))
    (first, one), (second, other) = seen
    assert first == second
    assert [name for name, _ in one] == [name for name, _ in other] == ["coords"]
    assert torch.equal(one[0][1], other[0][1])
    assert states[0]["trace"] == states[1]["trace"]
    assert first.slope != 0


def test_the_slope_pushes_its_multiple_of_the_noise():
    """Kills: noise other than what the probe saw; a tensor left out."""
    trainable = Full().attach(tiny_llama(1), basis=None, seed=0)
    pushed = {}
    trainable.slope(Direction(77), -0.37, lambda name, g: pushed.update({name: g.clone()}))
    assert sorted(pushed) == sorted(trainable.wire)
    for name, gradient in pushed.items():
        z = torch.from_numpy(noise("sign", 77, 0, name, 0, gradient.numel())).view(gradient.shape)
        assert torch.equal(gradient, z * -0.37)
