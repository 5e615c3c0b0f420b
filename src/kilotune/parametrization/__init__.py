"""Parametrization: what may change. A method attaches to a model and returns its live Trainable."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from kilotune.core.method import Method
from kilotune.core.trainable import Direction, Directions, Sink, Trainable

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Direction", "Directions", "Parametrization", "Sink", "Trainable"]


class Parametrization(Method):
    """Contract. If `neutral`, attachment leaves the output; rollback restores every bit; merged = attached."""

    uses_basis: ClassVar[bool] = False
    neutral: ClassVar[bool] = True  # False: what is added cannot start without effect
    writes_base: ClassVar[bool] = True  # False: all changes are in tensors of its own, the base can stay in its file

    @abstractmethod
    def attach(self, model: nn.Module, *, basis: Directions | None, seed: int) -> Trainable:
        """Make `model` trainable in this way (in place where the method must add modules).

        `seed` initialises what starts random. Raises RecipeError for bad targets.
        """

    def narrow(self, trainable: Trainable) -> None:
        """Between `begin` and `rollback`, for clients that follow a smaller version of the recipe's method: train no
        more than this one does. All of it, unless a method has sizes."""

    @property
    def looks_at(self) -> int:
        """How many rows it wants to look at before the first step (`prepare`); a federation cannot show it any."""
        return 0

    def prepare(self, trainable: Trainable, parts: Sequence[Callable[[], Tensor]], seed: int) -> None:
        """Before the first step: start from what the loss (the sum of the parts) says."""

    def numbers(self, shapes: dict[str, tuple[int, ...]], hidden: int) -> dict[str, int] | None:
        """Numbers of each wire tensor over a base of these weights and this width, where they follow from the fields;
        None: they have to be counted."""
        return None
