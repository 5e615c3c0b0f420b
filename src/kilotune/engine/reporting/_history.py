"""History: what a run's events say; a round, step or evaluation redone after a crash counts once, as redone."""

import math
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]

FAILURES = {"refused": "refused", "missing": "no answer", "error": "failed"}
"""Statuses of client events that mean a client did not take part, and how the report names them."""


@dataclass
class Part:
    """One client's part in a run."""

    rows: int | None = None
    rounds: int = 0
    up_bytes: int = 0
    seconds: float = 0.0
    loss: float | None = None  # training loss at its last step
    before: Event = field(default_factory=dict)  # held-out figures
    after: Event = field(default_factory=dict)
    failures: int = 0


class History:
    """The events of metrics.jsonl, sorted out. `rounds`, `steps` and `evaluations` are in order of their number."""

    def __init__(self, events: list[Event]) -> None:
        self.start = float(events[0].get("time", 0.0)) if events else 0.0
        self.incidents: list[Event] = []
        self.cut: dict[str, Event] = {}
        self.stopped: Event | None = None
        self._rows: dict[str, int] = {}
        self._answers: dict[tuple[int, str], Event] = {}
        rounds: dict[int, Event] = {}
        steps: dict[int, Event] = {}
        evaluations: dict[int, Event] = {}
        for event in events:
            kind = event["event"]
            if kind == "round":
                rounds[event["round"]] = event
            elif kind == "step":
                steps[event["step"]] = event
            elif kind == "evaluation":
                evaluations[event["round"] if "round" in event else event["step"]] = event
            elif kind == "clients":
                self._rows.update(event["rows"])
            elif kind == "client":
                self._client(event)
            elif kind == "truncated":
                self.cut[event["who"]] = event
            elif kind == "stopped":
                self.stopped = event
        self.rounds = [rounds[n] for n in sorted(rounds)]
        self.steps = [steps[n] for n in sorted(steps)]
        self.evaluations = dict(sorted(evaluations.items()))

    def _client(self, event: Event) -> None:
        if "num_examples" in event:
            self._rows[event["client"]] = event["num_examples"]
        if event["status"] in FAILURES:
            self.incidents.append(event)
        if "round" in event:
            self._answers[event["round"], event["client"]] = event

    @property
    def last_round(self) -> int:
        return int(self.rounds[-1]["round"]) if self.rounds else 0

    @property
    def unrecorded(self) -> list[int]:
        """Rounds the ledger holds, but whose event was lost: the process ended between the two."""
        return sorted(set(range(1, self.last_round + 1)) - {r["round"] for r in self.rounds})

    @property
    def alone(self) -> bool:
        """A local run over a basis: one client that is this machine, so nothing crossed a network."""
        return list(self._rows) == ["local"]

    @property
    def spent(self) -> list[tuple[int, float]]:
        """(round, epsilon so far) of a run with differential privacy, from round 0 on."""
        spent = [(int(r["round"]), value) for r in self.rounds if (value := reading(r, "epsilon")) is not None]
        return [(0, 0.0), *spent] if spent else []

    def payload_until(self, number: int) -> int:
        """Payload bytes, both directions, of all rounds up to and with `number`."""
        return sum(r["up_bytes"] + r["down_bytes"] for r in self.rounds if r["round"] <= number)

    def measured(self, key: str) -> list[tuple[int, float]]:
        """(round or step, reading) of every evaluation that has this reading."""
        readings = [(n, reading(e["overall"], key)) for n, e in self.evaluations.items()]
        return [(n, value) for n, value in readings if value is not None]

    def parts(self) -> dict[str, Part]:
        """Every client that was ever named, by name."""
        parts = {name: Part(rows=rows) for name, rows in self._rows.items()}
        for (number, client), event in sorted(self._answers.items(), key=lambda item: item[0][0]):
            part = parts.setdefault(client, Part())
            if event["status"] == "ok" and number <= self.last_round:  # later ones are not committed
                part.rounds += 1
                part.up_bytes += event.get("up_bytes", 0)
                part.seconds += event.get("seconds", 0.0)
                part.loss = reading(event, "loss")
        for event in self.incidents:
            parts.setdefault(event["client"], Part()).failures += 1
        for position, event in self.evaluations.items():
            for client, figures in (event.get("clients") or {}).items():
                part = parts.setdefault(client, Part())
                if position == 0:
                    part.before = figures
                else:
                    part.after = figures
        return dict(sorted(parts.items()))


def reading(figures: Event | None, key: str) -> float | None:
    """A number that can be drawn, or None: nothing was measured, or what came out is not finite."""
    value = (figures or {}).get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
