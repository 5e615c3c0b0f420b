"""Choosing: models that decide from the prompt of a row with what they compute that row.

Whoever runs such a model says which tokens are the prompt, never lays two rows into one, tells which rows of a cache
are left, and adds what the choice costs to the loss that is trained on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


class Chooser(ABC):
    """Contract. A row is computed with what was chosen for it, whatever other rows are in its batch."""

    @abstractmethod
    def hear(self, prompt: Tensor) -> None:
        """(B, T) bool: the tokens by which the next batch is chosen for; of a batch without it, all but the padding."""

    @abstractmethod
    def losses(self) -> Tensor:
        """(B,) float32: what each row of the last batch adds to the loss that is trained on; gradients flow."""

    @abstractmethod
    def keep(self, cache: object, rows: Tensor) -> None:
        """Of the rows whose keys and values are in this cache these are left, (n,) int64, in this order."""


def chooser(model: nn.Module) -> Chooser | None:
    """The model's chooser, if it has one."""
    found = getattr(model, "chooser", None)
    return found if isinstance(found, Chooser) else None
