"""Schedule: who trains in which round."""

from abc import abstractmethod
from typing import ClassVar

import numpy as np

from kilotune.core.method import Method

__all__ = ["Schedule"]


class Schedule(Method):
    """Contract. No client twice in a round; the same generator gives the same choice."""

    everybody: ClassVar[bool] = False
    """Whether every client is asked in every round."""

    @abstractmethod
    def sample(self, round: int, roster: list[str], rng: np.random.Generator) -> list[str]:
        """The clients of this round (rounds count from 1), a sorted sublist of the sorted roster."""

    def enough(self, num_asked: int) -> int:
        """Answers with which a round ends, whoever of the asked has not answered by then."""
        return num_asked
