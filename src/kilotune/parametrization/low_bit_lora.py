"""Low-bit LoRA: w + s · Q(B) Q(A), where Q puts every number of a factor on one of 2^b levels of that factor.

    Q(v) = mean + deviation · level((v - mean) / (deviation + 1e-5)),  mean and deviation those of v

The latent factors v are trained, in float32; the model computes with Q(v), and what a client sends is Q(v) as well: b
bits per number, and two numbers per factor (uplink: gaussian). Gradients pass the level as if it were not there
(straight through), and reach v through its mean and deviation too. A round starts from the mean of what clients have
sent; as latent factors serve those of which Q comes nearest to it.

Source: Jie et al., "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy"
    (1-bit adapters), arXiv 2307.16867, and the authors' code (JieShibo/PETL-ViT); the pair: Hu et al., "LoRA: Low-Rank
    Adaptation of Large Language Models", arXiv 2106.09685.
Departs: in a federation, which the paper does not have. The mean of several clients' factors has more than 2^b values;
    Q of it is nearer to one client's than to the mean where clients disagree, and latent factors are not kept between
    rounds, so a number that never crosses its threshold within a round stays where it is.
Memory: the latent factors beside those that the model computes with.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from kilotune.core.factors import B
from kilotune.core.lazy import torch
from kilotune.core.levels import fitted, gaussian_levels, gaussian_thresholds
from kilotune.core.rng import stream
from kilotune.core.types import TensorUpdate
from kilotune.parametrization import Directions, Parametrization, Sink, Trainable
from kilotune.parametrization._derived import DerivedTrainable
from kilotune.parametrization._pairs import adapted
from kilotune.parametrization._values import as_they_are, happened

if TYPE_CHECKING:
    from torch import Tensor, nn

EPS = 1e-5  # published code
START = 1e-3  # deviation of B at the start; published code: normal, cut off at 2, which is a thousand times as far


class LowBitTrainable(DerivedTrainable):
    """Wire tensors are the latent factors; an update holds the factors as they are, on their levels."""

    def __init__(self, model: nn.Module, params: dict[str, nn.Parameter], bits: int) -> None:
        super().__init__(model, params)
        self._bits = bits
        self._levels = torch.from_numpy(gaussian_levels(bits).astype(np.float32))
        self._thresholds = torch.from_numpy(gaussian_thresholds(bits).astype(np.float32))
        self.follow(self.wire)

    def follow(self, wire: dict[str, Tensor], *names: str) -> None:
        for name in names or wire:
            mean, deviation = _moments(wire[name])
            levels = self._levels[torch.bucketize((wire[name] - mean) / (deviation + EPS), self._thresholds)]
            self.params[name].data = levels.mul_(deviation).add_(mean)

    def pull(self, name: str, gradient: Tensor, sink: Sink) -> None:
        latent, count = self.wire[name], gradient.numel()
        mean, deviation = _moments(latent)
        if deviation == 0:
            sink(name, gradient)
            return
        through = deviation / (deviation + EPS)
        unit = (latent - mean) / deviation
        of_deviation = _dot(gradient, (self.params[name].data - mean) / deviation - through**2 * unit)
        of_mean = (1 - through) * float(gradient.numpy().sum(dtype=np.float64))
        sink(name, gradient * through + unit * (of_deviation / count) + of_mean / count)

    def update(self) -> TensorUpdate:
        """The factors as they are now, or zeros where none of them moved."""
        moved = any(not torch.equal(value, self._anchor[name]) for name, value in self.wire.items())
        return as_they_are({name: param.data for name, param in self.params.items()}, moved)

    def apply(self, changes: Iterable[tuple[str, Tensor]], root: int) -> None:
        factors = dict(changes)
        if happened(factors):
            for name, factor in factors.items():
                self.wire[name].copy_(self._latent(factor))
        self.follow(self.wire)

    def _latent(self, factor: Tensor) -> Tensor:
        """The multiple of a factor, moved, of which Q comes nearest to it."""
        values = factor.numpy().astype(np.float64).reshape(-1)
        own_mean, own_deviation = values.mean(), values.std()
        mean, deviation, _ = fitted(values, self._bits)
        latent = mean + (values - own_mean) * (deviation / own_deviation if own_deviation else 0.0)
        return torch.from_numpy(latent.astype(np.float32)).view(factor.shape)


def _moments(values: Tensor) -> tuple[float, float]:
    """Mean and deviation, summed in NumPy's fixed order, so that no number of threads changes a bit."""
    exact = values.detach().numpy().astype(np.float64)
    return float(exact.mean()), float(exact.std())


def _dot(a: Tensor, b: Tensor) -> float:
    return float(np.multiply(a.numpy(), b.numpy(), dtype=np.float64).sum())


class LowBitLora(Parametrization):
    writes_base: ClassVar[bool] = False
    neutral: ClassVar[bool] = False
    gives: ClassVar[frozenset[str]] = frozenset({"values", "adapter"})

    bits: int = Field(1, ge=1, le=8, description="b, bits of a number; paper: 1")
    rank: int = Field(32, ge=1, description="r; paper: 32, the width that the saved bits pay for")
    scale: float = Field(2.0, gt=0, description="s; LoRA's alpha / r = 16 / 8. Paper: one for each task")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="linear layers that get a pair, by their names; paper: q_proj and v_proj"
    )

    def attach(self, model: nn.Module, *, basis: Directions | None, seed: int) -> Trainable:
        wrapped, params = adapted(model, seed, self.rank, self.scale, self.targets)
        for name, param in params.items():
            if B in name:  # zeros have no deviation, and would stay zeros
                start = stream(seed, "low_bit_lora", name).normal(0.0, START, tuple(param.shape))
                param.data = torch.from_numpy(start.astype(np.float32))
        return LowBitTrainable(wrapped, params, self.bits)


METHOD = LowBitLora
