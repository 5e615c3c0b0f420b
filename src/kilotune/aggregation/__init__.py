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

    def __init__(self, rule: "Aggregation") -> None:
        self._rule = rule
        self._shares: list[float] = []

    def add(self, update: Update, num_examples: int) -> None:
        """Take one client's update; it may be freed afterwards."""
        self.add_weighted(update, float(self._rule.share(num_examples)))

    @abstractmethod
    def add_weighted(self, update: Update, share: float) -> None:
        """Take one update with a share of its own; shares are divided by their sum in the end."""

    @abstractmethod
    def result(self, state: State) -> Update:
        """What `Aggregation.combine` would make of all of them."""

    def weights(self) -> np.ndarray:
        """(n,) float64, sum 1: what each update counts in the result, in order of arrival."""
        shares = np.asarray(self._shares, dtype=np.float64)
        return shares / shares.sum()


class Aggregation(Method):
    """Contract. On the effective change: one client = identity; order irrelevant; n equal updates = that update."""

    takes: ClassVar[Literal["tensors", "seeds", "any"]] = "tensors"
    linear: ClassVar[bool] = True
    """Whether the result is the sum of weight · update with weights that no update has a say in."""

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

    def judged(self, updates: list[Update], weights: np.ndarray, state: State) -> tuple[Update, np.ndarray]:
        """`combine`, and what each update counts in its result: a rule may believe some more than others."""
        return self.combine(updates, weights, state), weights

    def gather(self) -> Gathering:
        """Where a round's updates go as they arrive. By default they are kept until the last one is there."""
        return _Kept(self)


class _Kept(Gathering):
    """For rules that need all updates at once, and for updates of a few pairs."""

    def __init__(self, rule: Aggregation) -> None:
        super().__init__(rule)
        self._updates: list[Update] = []
        self._used: np.ndarray | None = None

    def add_weighted(self, update: Update, share: float) -> None:
        self._updates.append(update)
        self._shares.append(share)

    def result(self, state: State) -> Update:
        combined, self._used = self._rule.judged(self._updates, super().weights(), state)
        return combined

    def weights(self) -> np.ndarray:
        """Known once the result is."""
        return super().weights() if self._used is None else self._used
