"""Parametrization: what may change. A method attaches to a model and returns its live Trainable."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from kilotune.core.method import Method
from kilotune.core.trainable import Direction, Directions, Sink, Trainable

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Direction", "Directions", "Parametrization", "Sink", "Trainable"]


class Parametrization(Method):
    """Contract. The output is unchanged at attachment; rollback restores every bit; merged = attached."""

    uses_basis: ClassVar[bool] = False
    writes_base: ClassVar[bool] = True  # False: all changes are in tensors of its own, the base can stay in its file

    @abstractmethod
    def attach(self, model: nn.Module, *, basis: Directions | None, seed: int) -> Trainable:
        """Make `model` trainable in this way (in place where the method must add modules).

        `seed` initialises what starts random. Raises RecipeError for bad targets.
        """

    def narrow(self, trainable: Trainable) -> None:
        """Between `begin` and `rollback`, for clients that follow a smaller version of the recipe's method: train no
        more than this one does. All of it, unless a method has sizes."""
