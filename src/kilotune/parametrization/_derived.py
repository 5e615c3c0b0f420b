"""Derived: the model's parameters are made of the wire tensors, and follow whatever changes these."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kilotune.core.trainable import Direction, Trainable
from kilotune.parametrization._direct import DirectTrainable

if TYPE_CHECKING:
    from torch import Tensor


class DerivedTrainable(DirectTrainable):
    """Probes make the parameters of moved wire tensors and put the kept ones back: both are small, so there is no need
    of an overlay that changes weights while they are read."""

    @abstractmethod
    def follow(self, wire: dict[str, Tensor], *names: str) -> None:
        """Point the parameters to what is made of these wire tensors, in new memory; no names: of all."""

    @contextmanager
    def perturbed(self, direction: Direction | None, epsilon: float) -> Iterator[None]:
        if direction is None:
            yield
            return
        moved = {name: step.add_(self.wire[name]) for name, step in self.probe(direction, epsilon).items()}
        kept = {name: param.data for name, param in self.params.items()}
        try:
            self.follow(moved)
            yield
        finally:
            for name, param in self.params.items():
                param.data = kept[name]

    def both(self, direction: Direction, epsilon: float, parts: Sequence[Callable[[], Tensor]]) -> tuple[float, float]:
        return Trainable.both(self, direction, epsilon, parts)

    def move(self, name: str, delta: Tensor, start: int = 0) -> None:
        super().move(name, delta, start)
        self.follow(self.wire, name)

    def rollback(self) -> None:
        super().rollback()
        self.follow(self.wire)

    def apply(self, changes: Iterable[tuple[str, Tensor]], root: int) -> None:
        super().apply(changes, root)
        self.follow(self.wire)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        super().restore(tensors)
        self.follow(self.wire)
