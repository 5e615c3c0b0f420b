"""Direct: the wire tensors are parameters of the model itself (all weights, or an adapter's factors)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from kilotune.core.noise import noise
from kilotune.core.trainable import Direction, Sink, Trainable
from kilotune.core.types import TensorUpdate
from kilotune.parametrization._overlay import overlaid


class DirectTrainable(Trainable):
    """Parameters trained where they are; a copy of them is taken when a round starts, for rollback and difference."""

    accumulates = False

    def __init__(self, model: nn.Module, params: dict[str, nn.Parameter]) -> None:
        self.model = model
        self.params = params
        self.wire = {name: param.data for name, param in params.items()}
        self._anchor: dict[str, Tensor] = {}

    def sources(self) -> dict[str, nn.Parameter]:
        return self.params

    def pull(self, name: str, gradient: Tensor, sink: Sink) -> None:
        sink(name, gradient)

    def draw(self, rng: np.random.Generator) -> Direction:
        return Direction(int(rng.integers(1 << 63)))

    def _noise(self, direction: Direction, name: str) -> Tensor:
        value = self.wire[name]
        flat = noise("sign", direction.index, 0, name, 0, value.numel())
        return torch.from_numpy(flat).view(value.shape)

    @contextmanager
    def perturbed(self, direction: Direction | None, epsilon: float) -> Iterator[None]:
        if direction is None:
            yield
            return

        def fill(name: str, value: Tensor, out: Tensor) -> None:
            torch.add(value, self._noise(direction, name), alpha=epsilon, out=out)

        with overlaid(self.model, self.params, fill):
            yield

    def slope(self, direction: Direction, slope: float, sink: Sink) -> None:
        for name in self.params:
            sink(name, self._noise(direction, name).mul_(slope))

    def move(self, name: str, delta: Tensor) -> None:
        self.wire[name].add_(delta)

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
