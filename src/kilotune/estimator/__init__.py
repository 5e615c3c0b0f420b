"""Estimator: how the gradient is got."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kilotune.core.method import Method
from kilotune.core.trainable import Sink, Trainable
from kilotune.core.types import State

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Estimate", "Estimator", "Objective", "Sink", "State", "Trainable"]


class Objective(ABC):
    """The loss of one batch as a sum of parts (micro-batches); every call sees the same rows.

    `release`, where there is one, is all an estimator may tell of the slopes of single examples: it takes them, (n,),
    and gives the one number to use (example-level privacy).
    """

    release: Callable[[np.ndarray], float] | None = None

    @abstractmethod
    def parts(self) -> list[Callable[[], Tensor]]:
        """Each returns a float32 scalar; their sum is the mean loss over the batch's labelled tokens."""

    def examples(self) -> list[Callable[[], Tensor]]:
        """Each returns the mean losses (n,) of some examples, always in one order; together they are all examples."""
        raise NotImplementedError


@dataclass(frozen=True)
class Estimate:
    """What one estimate saw: the loss, and for forward-only estimators the (direction, slope) probed."""

    loss: float
    index: int | None = None
    slope: float = 0.0


class Estimator(Method):
    """Contract. On return the stored weights have moved only by what the sink did with the pushed gradients."""

    forward_only: ClassVar[bool] = False

    @abstractmethod
    def estimate(
        self, objective: Objective, trainable: Trainable, rng: np.random.Generator, state: State, sink: Sink
    ) -> Estimate:
        """Push a gradient for every wire tensor into the sink."""

    def suggested_lr(self, state: State) -> float | None:
        """A learning rate measured on the way, where the estimator knows one (optimizer.lr: auto)."""
        return None
