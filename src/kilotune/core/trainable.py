"""Trainable: what is changed while a model trains, and how one global change is undone, sent and replayed.

A parametrization attaches to a model and returns a Trainable. Estimators push gradients into it, the
engine's step lets the optimizer turn them into changes, rounds export them. *Wire tensors* are the
numbers that are optimised and travel: the weights themselves (full), an adapter's factors (peft), or
the coordinates of a basis (subspace).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from kilotune.core.int8 import Int8
from kilotune.core.types import SeedUpdate, State, TensorUpdate

if TYPE_CHECKING:
    from torch import Tensor, nn


class Sink(Protocol):
    """Takes the gradient of a wire tensor, which may be freed or written over as soon as the call returns.

    One that is a formula comes in parts instead, so that it never exists whole: each flat, from number `start` of the
    tensor on, one after the other.
    """

    def __call__(self, name: str, gradient: Tensor, start: int = 0, /) -> None: ...


Round: TypeAlias = "tuple[Iterable[tuple[str, Tensor]], int]"
"""What `apply` takes: the changes of a round and its root."""


class Directions(Protocol):
    """The part of the basis contract that a parametrization uses (see kilotune.basis.Basis)."""

    @property
    def size(self) -> int: ...
    @property
    def scale(self) -> str: ...
    @property
    def one_pass(self) -> bool: ...
    def coordinates(self, update: SeedUpdate) -> Tensor: ...
    def direction(self, index: int) -> Tensor: ...
    def add(
        self,
        weight: Tensor | Int8,
        name: str,
        steps: list[tuple[int, Tensor]],
        out: Tensor | None = None,
        start: int = 0,
    ) -> Tensor: ...
    def add_both(
        self,
        weight: Tensor | Int8,
        name: str,
        root: int,
        coordinates: Tensor,
        plus: Tensor,
        minus: Tensor,
        start: int = 0,
        opposite: Tensor | None = None,
    ) -> None: ...
    def project(self, gradient: Tensor, name: str, root: int) -> Tensor: ...


@dataclass(frozen=True)
class Direction:
    """One direction to probe: an index into a basis, or the seed of fresh noise over the wire tensors."""

    index: int


class Trainable(ABC):
    """Contract. Between `begin` and `rollback` the model moves; `rollback` restores it bit for bit."""

    model: nn.Module
    wire: dict[str, Tensor]

    @property
    @abstractmethod
    def accumulates(self) -> bool:
        """True when `pull` sums gradients of micro-batches itself (they need not pile up in `.grad`)."""

    @abstractmethod
    def sources(self) -> dict[str, nn.Parameter]:
        """Model tensors whose gradients backprop must deliver, sorted by name."""

    @abstractmethod
    def pull(self, name: str, gradient: Tensor, sink: Sink) -> None:
        """Take the gradient of one source; pass wire gradients on to the sink as soon as they are complete."""

    def flush(self, sink: Sink) -> None:  # noqa: B027 - nothing is held back by default
        """Pass on wire gradients that had to wait for all sources."""

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> Direction:
        """A random direction to probe."""

    @abstractmethod
    def perturbed(self, direction: Direction | None, epsilon: float) -> AbstractContextManager[None]:
        """Inside, forward passes see the state moved by epsilon along the direction; stored weights do not change."""

    def both(self, direction: Direction, epsilon: float, parts: Sequence[Callable[[], Tensor]]) -> tuple[float, float]:
        """The sums of the parts at +epsilon and at -epsilon; a method may take both in one walk over its weights."""
        losses = []
        for side in (epsilon, -epsilon):
            with self.perturbed(direction, side):
                losses.append(sum(float(part()) for part in parts))
        return losses[0], losses[1]

    @abstractmethod
    def slope(self, direction: Direction, slope: float, sink: Sink) -> None:
        """Push slope · z, the gradient estimate along one direction."""

    @abstractmethod
    def move(self, name: str, delta: Tensor, start: int = 0) -> None:
        """Add delta to a wire tensor, or to its numbers from `start` on, and let the model follow."""

    @abstractmethod
    def begin(self, root: int, forward_only: bool = False) -> None:
        """Start a round here: wire changes count from this state; `root` seeds the round's basis.

        `forward_only` promises that no gradient will be pulled before the next `begin`, so that no copy
        of the weights is needed where changes can be seen through an overlay instead.
        """

    def take_up(self, kept: State) -> None:  # noqa: B027 - most methods share all they train
        """From here to `rollback`, train tensors of one client's own beside the shared ones: from what `own` gave in
        its last round, or from their start where that is empty. They are wire tensors, but part of no update."""

    def own(self) -> State:
        """A copy of the client's own tensors as they are; none by default."""
        return {}

    @abstractmethod
    def update(self) -> TensorUpdate:
        """The change of the wire tensors since `begin`."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that `update` gives and `apply` takes: the wire tensors, unless something is made of them."""
        return {name: tuple(value.shape) for name, value in self.wire.items()}

    @abstractmethod
    def rollback(self) -> None:
        """Back to the state at `begin`, bit for bit."""

    @abstractmethod
    def apply(self, changes: Iterable[tuple[str, Tensor]], root: int) -> None:
        """Make a global change permanent. `changes` are (wire tensor, change) pairs; for a basis, its coordinates."""

    def replay(self, rounds: Sequence[Round], fresh: bool = False) -> None:
        """`apply` round after round, same bits; a method may take all rounds in one walk over its tensors.

        `fresh` promises that nobody else looks at the changed tensors, and asks that a method which rewrites whole
        tensors writes them to new memory: the stored ones may be mapped from a file.
        """
        for changes, root in rounds:
            self.apply(changes, root)

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The tensors that define the tuned model beyond its base (weights or adapter), sorted by name."""

    @abstractmethod
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` returned elsewhere, as the state rounds count from."""
