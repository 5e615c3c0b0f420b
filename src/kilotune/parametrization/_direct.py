"""Direct: the wire tensors are parameters of the model itself (all weights, or an adapter's factors)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from kilotune.core.lazy import torch
from kilotune.core.noise import stream_key
from kilotune.core.trainable import Direction, Sink, Trainable
from kilotune.core.types import TensorUpdate
from kilotune.parametrization._overlay import BLOCK, Fill, Overlay

if TYPE_CHECKING:
    from torch import Tensor, nn


class DirectTrainable(Trainable):
    """Parameters trained where they are; a copy of them is taken when a round starts, for rollback and difference."""

    accumulates = False

    def __init__(self, model: nn.Module, params: dict[str, nn.Parameter]) -> None:
        self.model = model
        self.params = params
        self.wire = {name: param.data for name, param in params.items()}
        self._anchor: dict[str, Tensor] = {}
        self._overlay = Overlay(model, params)

    def sources(self) -> dict[str, nn.Parameter]:
        return self.params

    def pull(self, name: str, gradient: Tensor, sink: Sink) -> None:
        sink(name, gradient)

    def draw(self, rng: np.random.Generator) -> Direction:
        return Direction(int(rng.integers(1 << 63)))

    def _signs(self, direction: Direction, name: str, size: float) -> tuple[tuple[int, int], np.ndarray]:
        """The key of a tensor's signs, and the one number they are multiplied with, as the kernels want it."""
        return stream_key("sign", direction.index, 0, name), np.full(1, size, np.float32)

    @contextmanager
    def perturbed(self, direction: Direction | None, epsilon: float) -> Iterator[None]:
        if direction is None:
            yield
            return
        with self._overlay.over(self._fill(direction, epsilon)):
            yield

    def both(self, direction: Direction, epsilon: float, parts: Sequence[Callable[[], Tensor]]) -> tuple[float, float]:
        """The sums of the parts at +epsilon and at -epsilon: `perturbed` twice, in fewer passes over the weights."""
        return self._overlay.both(self._fill(direction, epsilon), parts)

    def _fill(self, direction: Direction, epsilon: float) -> Fill:
        from kilotune.core import kernels  # numba takes half a second to import

        def fill(name: str, stored: Tensor, start: int, plus: Tensor | None, minus: Tensor | None) -> None:
            key, up = self._signs(direction, name, epsilon)
            if plus is not None and minus is not None:
                kernels.tiled_both(_flat(stored), _flat(plus), _flat(minus), key, (up, -up), start)
            elif plus is not None:
                kernels.tiled_add(_flat(stored), _flat(plus), [(key, up)], start)
            elif minus is not None:
                kernels.tiled_add(_flat(stored), _flat(minus), [(key, -up)], start)

        return fill

    def slope(self, direction: Direction, slope: float, sink: Sink) -> None:
        from kilotune.core import kernels

        room = torch.empty(BLOCK)
        for name, value in self.wire.items():
            signs = self._signs(direction, name, slope)
            for start in range(0, value.numel(), BLOCK):
                part = room[: min(BLOCK, value.numel() - start)].zero_()
                kernels.tiled_add(part.numpy(), part.numpy(), [signs], start)
                if len(part) == value.numel():
                    sink(name, part.view(value.shape))
                else:
                    sink(name, part, start)

    def probe(self, direction: Direction, epsilon: float) -> dict[str, Tensor]:
        """epsilon · z for every wire tensor, whole."""
        found = {name: torch.empty_like(value) for name, value in self.wire.items()}

        def put(name: str, part: Tensor, start: int = 0, /) -> None:
            found[name].view(-1)[start : start + part.numel()] = part.view(-1)

        self.slope(direction, epsilon, put)
        return found

    def move(self, name: str, delta: Tensor, start: int = 0) -> None:
        value = self.wire[name]
        part = value if delta.shape == value.shape else value.view(-1)[start : start + delta.numel()]
        part.add_(delta)

    def begin(self, root: int, forward_only: bool = False) -> None:
        for name, value in self.wire.items():
            if name in self._anchor:
                self._anchor[name].copy_(value)
            else:
                self._anchor[name] = value.clone()

    def update(self) -> TensorUpdate:
        return TensorUpdate({name: value - self._anchor[name] for name, value in self.wire.items()})

    def rollback(self) -> None:
        for name, value in self.wire.items():
            value.copy_(self._anchor[name])

    def apply(self, changes: Iterable[tuple[str, Tensor]], root: int) -> None:
        for name, change in changes:
            self.wire[name].add_(change)

    def state(self) -> dict[str, Tensor]:
        return dict(sorted(self.wire.items()))

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, value in self.wire.items():
            value.copy_(tensors[name])
        self._anchor.clear()


def _flat(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.view(-1).numpy()
    return array
