"""Optimizer: one tensor at a time, so that a gradient can be used and freed before the next exists."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from kilotune.core.method import Method
from kilotune.core.types import State

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Optimizer", "State"]


class Optimizer(Method):
    """Contract. The same rules serve local steps and the server's step over the mean update."""

    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        1e-3, description="learning rate; auto: measured by an estimator that can"
    )

    @abstractmethod
    def init(self, param: Tensor) -> State:
        """Fresh state for one tensor (no bytes for a stateless rule)."""

    @abstractmethod
    def update(self, gradient: Tensor, state: State, param: Tensor, lr: float) -> Tensor:
        """The change to add to `param` (same shape, float32). `state` moves on in place."""
