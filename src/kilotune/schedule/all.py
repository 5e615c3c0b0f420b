"""All: every client trains in every round.

Source: full participation, the setting of cross-silo federations.
"""

from typing import ClassVar

import numpy as np

from kilotune.schedule import Schedule


class All(Schedule):
    """Everybody, always; draws no random number."""

    everybody: ClassVar[bool] = True

    def sample(self, round: int, roster: list[str], rng: np.random.Generator) -> list[str]:
        """The sorted roster."""
        return sorted(roster)


METHOD = All
