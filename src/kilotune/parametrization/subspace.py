"""Subspace: all weights move, but only along a public basis: w = w0 + r_t · Σ_k a_k z_k, and a (M numbers) is trained.

The gradient of a is one pass over each weight's gradient, the optimizer's state is M numbers, and M
numbers travel. r_t is the rms of tensor t in the base (basis.scale: rms) or 1.

Source: Qin et al., "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost
    under 18 Kilobytes", arXiv 2312.06353 (coefficients of seeded directions as the whole update);
    Li et al., "Measuring the Intrinsic Dimension of Objective Landscapes", arXiv 1804.08838 (training in a random
    subspace).
Departs: the tiled basis, its refresh every round and the rms scale are ours (docs/wire.md).
Memory: with backprop one more copy of the covered weights, for exact rollback; none with forward passes only
    over a one-pass basis, where the weights are never written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from kilotune.core.errors import IncompatibleError
from kilotune.core.lazy import torch
from kilotune.core.trainable import Round
from kilotune.core.types import TensorUpdate
from kilotune.parametrization import Direction, Directions, Parametrization, Sink, Trainable
from kilotune.parametrization._overlay import Fill, Overlay
from kilotune.parametrization._targets import parameters

if TYPE_CHECKING:
    from torch import Tensor, nn

WIRE = "coords"


class SubspaceTrainable(Trainable):
    """Coordinates of a basis over the covered weights.

    `probabilities` (size,), when set, is the law by which `draw` picks directions (FedKSeed-Pro).
    """

    accumulates = True

    def __init__(self, model: nn.Module, params: dict[str, nn.Parameter], basis: Directions) -> None:
        self.model, self.params, self.basis = model, params, basis
        self.wire = {WIRE: torch.zeros(basis.size)}
        self.probabilities: np.ndarray | None = None
        self._overlay = Overlay(model, params)
        self._unwritten = False
        self._scales = _scales(params, basis.scale)
        self._gradient = torch.zeros(basis.size)
        self._anchor: dict[str, Tensor] = {}
        self._dirty = False
        self._root = 0

    def sources(self) -> dict[str, nn.Parameter]:
        return self.params

    def pull(self, name: str, gradient: Tensor, sink: Sink) -> None:
        projected = self.basis.project(gradient.contiguous(), name, self._root)
        self._gradient.add_(projected, alpha=self._scales[name])

    def flush(self, sink: Sink) -> None:
        sink(WIRE, self._gradient)
        self._gradient.zero_()

    def draw(self, rng: np.random.Generator) -> Direction:
        if self.probabilities is None:
            return Direction(int(rng.integers(self.basis.size)))
        return Direction(int(rng.choice(self.basis.size, p=self.probabilities)))

    def _coords(self, direction: Direction | None, epsilon: float) -> Tensor:
        """Where a probe looks, as coordinates seen from the stored weights."""
        coords = self.wire[WIRE].clone() if self._unwritten else torch.zeros(self.basis.size)
        return coords if direction is None else coords.add_(self.basis.direction(direction.index), alpha=epsilon)

    def _fill(self, plus: Tensor, minus: Tensor) -> Fill:
        def fill(name: str, stored: Tensor, start: int, up: Tensor | None, down: Tensor | None) -> None:
            scale = self._scales[name]
            if up is not None and down is not None:
                self.basis.add_both(stored, name, self._root, plus * scale, up, down, start, opposite=minus * scale)
            elif up is not None:
                self.basis.add(stored, name, [(self._root, plus * scale)], out=up, start=start)
            elif down is not None:
                self.basis.add(stored, name, [(self._root, minus * scale)], out=down, start=start)

        return fill

    @contextmanager
    def perturbed(self, direction: Direction | None, epsilon: float) -> Iterator[None]:
        coords = self._coords(direction, epsilon)
        if not coords.any():
            yield
            return
        with self._overlay.over(self._fill(coords, coords)):
            yield

    def both(self, direction: Direction, epsilon: float, parts: Sequence[Callable[[], Tensor]]) -> tuple[float, float]:
        """The sums of the parts at +epsilon and at -epsilon: `perturbed` twice, in fewer passes over the weights."""
        return self._overlay.both(
            self._fill(self._coords(direction, epsilon), self._coords(direction, -epsilon)), parts
        )

    def slope(self, direction: Direction, slope: float, sink: Sink) -> None:
        sink(WIRE, self.basis.direction(direction.index).mul_(slope))

    def move(self, name: str, delta: Tensor, start: int = 0) -> None:
        assert len(delta) == len(self.wire[name]), "subspace: coordinates move all at once"
        self.wire[name].add_(delta)
        if self._unwritten:
            return
        if not self._anchor:
            self._anchor = {n: p.data.clone() for n, p in self.params.items()}
        self._dirty = True
        for n, param in self.params.items():
            self.basis.add(param.data, n, [(self._root, delta * self._scales[n])])

    def begin(self, root: int, forward_only: bool = False) -> None:
        self.rollback()
        self._root = root
        self._unwritten = forward_only and self.basis.one_pass

    def update(self) -> TensorUpdate:
        return TensorUpdate({WIRE: self.wire[WIRE].clone()})

    def rollback(self) -> None:
        self.wire[WIRE].zero_()
        self._gradient.zero_()
        if self._dirty:
            for name, param in self.params.items():
                param.data.copy_(self._anchor[name])
            self._dirty = False

    def apply(self, changes: Iterable[tuple[str, Tensor]], root: int) -> None:
        self.replay([(changes, root)])

    def replay(self, rounds: Sequence[Round], fresh: bool = False) -> None:
        self.rollback()
        steps = [(root, coords) for changes, root in rounds for _, coords in changes]
        for name, param in self.params.items():
            out = torch.empty_like(param.data) if fresh else param.data
            scaled = [(root, coords * self._scales[name]) for root, coords in steps]
            param.data = self.basis.add(param.data, name, scaled, out=out)
            if self._anchor:
                self._anchor[name].copy_(out)

    def state(self) -> dict[str, Tensor]:
        return {name: param.data for name, param in self.params.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, param in self.params.items():
            param.data.copy_(tensors[name])
        self._anchor.clear()
        self._dirty = False
        self.rollback()


def _scales(params: dict[str, nn.Parameter], law: str) -> dict[str, float]:
    from kilotune.core.kernels import rms  # numba takes half a second to import

    return {name: rms(param.data) if law == "rms" else 1.0 for name, param in params.items()}


class Subspace(Parametrization):
    uses_basis: ClassVar[bool] = True

    targets: Literal["all"] | tuple[str, ...] = Field("all", description="tensors that move: all, or parts of names")

    def attach(self, model: nn.Module, *, basis: Directions | None, seed: int) -> Trainable:
        if basis is None:
            raise IncompatibleError("parametrization 'subspace' needs a basis. Add basis: {name: tiled}.")
        return SubspaceTrainable(model, parameters(model, self.targets), basis)


METHOD = Subspace
