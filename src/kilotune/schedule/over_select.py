"""Over-select: ask ⌈factor · S⌉ clients drawn with equal chances, go on with the first S answers.

Source: Bonawitz et al., "Towards Federated Learning at Scale: System Design", arXiv 1902.01046: 1.3 times as many
devices as needed are selected, to make up for those that drop out or are slow.
Departs: in a simulation nobody is slow, so the S that answer are drawn as well, from the round's own stream. Between
machines the fast ones answer first: a client that is always slow is heard less.
"""

import math

import numpy as np
from pydantic import Field

from kilotune.schedule.uniform import Uniform


class OverSelect(Uniform):
    """A spare for every client that may not answer."""

    factor: float = Field(1.3, ge=1, description="clients asked, in multiples of clients_per_round; paper: 1.3")

    def sample(self, round: int, roster: list[str], rng: np.random.Generator) -> list[str]:
        """A sorted sublist of the sorted roster."""
        asked = math.ceil(self.factor * self.clients_per_round - 1e-9)  # 1.1 · 10 is a little more than 11
        return Uniform(clients_per_round=asked).sample(round, roster, rng)

    def enough(self, num_asked: int) -> int:
        """S, or as many as there are."""
        return min(self.clients_per_round, num_asked)


METHOD = OverSelect
