"""Pace: clients that are much slower than others with the same work. They are told, so that someone looks at their
machine, and may get less to do (`adapt_steps`): as many local steps as take the time that the median client needs.

Source: the watch of C4 (Dong et al., "Boosting Large-scale Parallel Training Efficiency with C4", arXiv 2406.04594)
in its simplest form: equal work takes about equal time, so slowness shows without a model of the machines.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kilotune.engine.composing.plan import Plan

FACTOR, TIMES, LEAST = 3.0, 2, 3
"""Slow is more than FACTOR times the median of at least LEAST clients, in TIMES rounds."""


@dataclass(frozen=True)
class Slow:
    """A client and the seconds of its last round, beside those of its class."""

    client: str
    seconds: float
    median_seconds: float


class Pace:
    """Seconds of the clients' whole rounds, by class: clients of one group of a mixed federation do the same work."""

    def __init__(self, adapts: bool = False) -> None:
        self._adapts = adapts
        self._round: dict[object, dict[str, float]] = defaultdict(dict)
        self._last: dict[object, dict[str, float]] = defaultdict(dict)
        self._times: Counter[str] = Counter()

    def asked(self, client: str, group: int) -> dict[str, int | float]:
        """What a request says of the work: the group, and a share of its steps for a client that was slow."""
        known = self._last[group]
        if not self._adapts or client not in known or len(known) < LEAST:
            return {"group": group}
        return {"group": group, "share": min(1.0, median(known.values()) / known[client])}

    def note(self, client: str, asked: dict[str, str | int | float | bool], seconds: object) -> None:
        """A client's answer to what was asked, as seconds of a whole round; what is no positive number is left out."""
        if isinstance(seconds, int | float) and seconds > 0:
            whole = float(seconds) / float(asked.get("share", 1.0))
            self._round[asked["group"]][client] = self._last[asked["group"]][client] = whole

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


def lighter(plan: "Plan", share: object) -> "Plan":
    """The plan with this share of its local steps, at least one. Batches then follow the steps really taken."""
    if not plan.recipe.adapt_steps or not isinstance(share, int | float) or not 0 < share < 1:
        return plan
    steps = max(1, round(share * plan.recipe.local_steps))
    return replace(plan, recipe=plan.recipe.model_copy(update={"local_steps": steps}))


def pace_clashes(plan: "Plan") -> list[str]:
    """What counts on equal steps."""
    if not plan.recipe.adapt_steps:
        return []
    faults = {
        "secure_aggregation": plan.recipe.secure_aggregation.enabled,
        f"privacy {plan.privacy.method_name()!r}" if plan.privacy else "": plan.privacy is not None,
        f"optimizer {plan.optimizer.method_name()!r}": plan.optimizer.hears,
        "streaming": plan.recipe.streaming.overlap > 0,
    }
    return [
        f"adapt_steps: {name} counts on equal steps of all clients. Use --set adapt_steps=false."
        for name, applies in faults.items()
        if applies
    ]
