"""Uniform: a fixed number of clients, drawn without replacement with equal chances.

Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", arXiv 1602.05629,
algorithm 1.
Departs: the number is given instead of a fraction; when fewer clients are present, all of them train.
"""

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from kilotune.schedule import Schedule


class Uniform(Schedule):
    """The clients with the smallest of independent uniform numbers, so that every subset is equally likely."""

    example: ClassVar[dict[str, Any]] = {"clients_per_round": 2}

    clients_per_round: int = Field(ge=1, description="clients that train in one round")

    def sample(self, round: int, roster: list[str], rng: np.random.Generator) -> list[str]:
        """A sorted sublist of the sorted roster."""
        ordered = sorted(roster)
        chosen = np.argsort(rng.random(len(ordered)), kind="stable")[: self.clients_per_round]
        return [ordered[i] for i in sorted(chosen)]


METHOD = Uniform
