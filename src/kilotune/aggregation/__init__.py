"""Aggregation: the updates of a round's clients become one update."""

from abc import abstractmethod
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from kilotune.core.method import Method
from kilotune.core.types import SeedUpdate, State, TensorUpdate, Update

__all__ = ["Aggregation", "SeedUpdate", "State", "TensorUpdate", "Update"]


class Aggregation(Method):
    """Contract. On the effective change: one client = identity; order irrelevant; n equal updates = that update."""

    takes: ClassVar[Literal["tensors", "seeds"]] = "tensors"

    weighting: Literal["examples", "equal"] = Field(
        "examples", description="weight of a client: its number of examples, or the same for all"
    )

    def weights(self, num_examples: list[int]) -> np.ndarray:
        """(n,) float64 that sums to 1."""
        counts = np.asarray(num_examples if self.weighting == "examples" else [1] * len(num_examples), dtype=np.float64)
        return counts / counts.sum()

    @abstractmethod
    def combine(self, updates: list[Update], weights: np.ndarray, state: State) -> Update:
        """One update from n >= 1; `weights` (n,) float64, sum 1."""
