"""Aggregation: the updates of a round's clients become one update."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from kilotune.core.method import Method
from kilotune.core.types import SeedUpdate, State, TensorUpdate, Update

__all__ = ["Aggregation", "Gathering", "SeedUpdate", "State", "TensorUpdate", "Update"]


class Gathering(ABC):
    """The updates of one round, taken one at a time in order of arrival."""

    @abstractmethod
    def add(self, update: Update, num_examples: int) -> None:
        """Take one client's update; it may be freed afterwards."""

    @abstractmethod
    def result(self, state: State) -> Update:
        """What `Aggregation.combine` would make of all of them."""


class Aggregation(Method):
    """Contract. On the effective change: one client = identity; order irrelevant; n equal updates = that update."""

    takes: ClassVar[Literal["tensors", "seeds"]] = "tensors"

    weighting: Literal["examples", "equal"] = Field(
        "examples", description="weight of a client: its number of examples, or the same for all"
    )

    def share(self, num_examples: int) -> int:
        """What a client weighs, before the weights of a round are made to sum to 1."""
        return num_examples if self.weighting == "examples" else 1

    def weights(self, num_examples: list[int]) -> np.ndarray:
        """(n,) float64 that sums to 1."""
        counts = np.asarray([self.share(count) for count in num_examples], dtype=np.float64)
        return counts / counts.sum()

    @abstractmethod
    def combine(self, updates: list[Update], weights: np.ndarray, state: State) -> Update:
        """One update from n >= 1; `weights` (n,) float64, sum 1."""

    def gather(self) -> Gathering:
        """Where a round's updates go as they arrive. By default they are kept until the last one is there."""
        return _Kept(self)


class _Kept(Gathering):
    """For rules that need all updates at once, and for updates of a few pairs."""

    def __init__(self, rule: Aggregation) -> None:
        self._rule = rule
        self._updates: list[Update] = []
        self._counts: list[int] = []

    def add(self, update: Update, num_examples: int) -> None:
        self._updates.append(update)
        self._counts.append(num_examples)

    def result(self, state: State) -> Update:
        return self._rule.combine(self._updates, self._rule.weights(self._counts), state)
