"""Pace: clients that are much slower than others with the same work, told so that someone looks at their machine.

Source: the watch of C4 (Dong et al., "Boosting Large-scale Parallel Training Efficiency with C4", arXiv 2406.04594)
in its simplest form: equal work takes about equal time, so slowness shows without a model of the machines.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from statistics import median

FACTOR, TIMES, LEAST = 3.0, 2, 3
"""Slow is more than FACTOR times the median of at least LEAST clients, in TIMES rounds."""


@dataclass(frozen=True)
class Slow:
    """A client and the seconds of its last round, beside those of its class."""

    client: str
    seconds: float
    median_seconds: float


class Pace:
    """Seconds of the clients' rounds, by class: clients of one group of a mixed federation do the same work."""

    def __init__(self) -> None:
        self._round: dict[object, dict[str, float]] = defaultdict(dict)
        self._times: Counter[str] = Counter()

    def note(self, client: str, group: object, seconds: object) -> None:
        """A client's answer; what is no number is left out."""
        if isinstance(seconds, int | float):
            self._round[group][client] = float(seconds)

    def slow(self) -> list[Slow]:
        """The round is over: who was slow for the second time since it was told last."""
        found = []
        for seconds in self._round.values():
            middle = median(seconds.values())
            for client in sorted(seconds) if len(seconds) >= LEAST else ():
                self._times[client] += seconds[client] > FACTOR * middle
                if self._times[client] == TIMES:
                    del self._times[client]
                    found.append(Slow(client, seconds[client], middle))
        self._round.clear()
        return found
