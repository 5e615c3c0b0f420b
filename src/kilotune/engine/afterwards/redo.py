"""Redo: committed rounds computed again from what their clients sent, by the server's own code.

With everybody in it a round has to come to the very payload that was committed: that is an audit. With one client left
out it is the round as the server would have combined the others' answers: that is a withdrawal. Who counted, with how
many rows, comes from the ledger; what they sent from the book; bounds, weights, the server's optimizer and what the
parts remember from round to round are worked out anew.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch

from kilotune.core.errors import RunError, WireError
from kilotune.core.types import SeedUpdate, State, TensorUpdate, Update
from kilotune.engine.composing.plan import Plan
from kilotune.engine.rounds.book import Book, Facts, read_entries
from kilotune.engine.rounds.gate import Gate
from kilotune.engine.rounds.guard import Guard, Judgement, Mark, Verdict, capped
from kilotune.engine.rounds.intake import Intake
from kilotune.engine.rounds.late import Lateness
from kilotune.engine.rounds.ledger import Contribution, Ledger, Record
from kilotune.engine.rounds.outcome import Outcome, ServerState, outcome
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rounds.tally import Answer
from kilotune.engine.runfolder import RECIPE, RunFolder

CONTRIBUTIONS = "contributions"


class Shelf(Book):
    """Books that are only read."""

    def open(self, number: int, head: str = "") -> dict[str, Facts]:
        """Turn to a round; nothing is cut off. `digests` then holds the SHA-256 of what each client sent."""
        self._path, self._places = self.path(number), {}
        self.digests: dict[str, str] = {}
        found: dict[str, Facts] = {}
        for entry, start in read_entries(self._path):
            self._places[entry.client] = (start, len(entry.payload))
            self.digests[entry.client] = hashlib.sha256(entry.payload).hexdigest()
            found[entry.client] = entry.facts
        return found

    def sizes(self) -> dict[str, int]:
        """Bytes that each client sent in the round turned to."""
        return {client: size for client, (_, size) in self._places.items()}

    def require(self, record: Record, without: str | None = None) -> None:
        """Raises RunError when the round's book was not kept, WireError naming whose payload is not what counted."""
        self.open(record.round)
        parts = [part for part in record.contributions if part.client != without]
        if parts and not self._path.exists():
            raise RunError(
                f"{self._path}: not there: what the clients sent in round {record.round} was not kept. "
                "Federate with keep_contributions: always."
            )
        for part in parts:
            found = self.digests.get(part.client)
            if found != part.payload_sha256:
                what = "missing or cut" if found is None else f"another one ({found[:16]})"
                raise WireError(
                    f"{self._path}: round {record.round}: the payload of client {part.client!r} is {what}; the ledger "
                    f"counted {part.payload_sha256[:16]}."
                )


class Recorded(Gate):
    """Objects where the gate objected when the round was made."""

    def __init__(self, rejected: bool) -> None:
        self._rejected = rejected

    @property
    def closed(self) -> bool:
        return self._rejected

    def objection(self, number: int, payload: bytes) -> str | None:
        return "as recorded" if self._rejected else None


class AsRecorded(Guard):
    """Bounds as the ledger gives them, for rounds whose guard knew what is not recorded."""

    def __init__(self, plan: Plan, replica: Replica, state: State, parts: Mapping[str, Contribution]) -> None:
        super().__init__(plan, replica, state)
        self._parts = parts

    def check(self, number: int, group: int, answer: Answer, update: Update, factor: float) -> Mark:
        return Mark(group, 1.0)

    def judge(self, answers, marks, factor, again) -> Judgement:  # type: ignore[no-untyped-def]
        clients = sorted(answers)
        rule = self._plan.aggregation
        shares = [float(rule.share(answers[client].num_examples)) * answers[client].discount for client in clients]
        fair = capped(shares, self._section.weight_cap)
        parts = [self._parts[client] for client in clients]
        verdicts = {p.client: Verdict(share, p.limit, p.scale) for p, share in zip(parts, fair, strict=True)}
        return Judgement(verdicts, {}, 0.0, 0.0, 0)


class Nobody:
    """The intake of a round in which nobody is left."""

    def __init__(self, plan: Plan, replica: Replica) -> None:
        self._plan, self._replica = plan, replica

    def combine(self, state: State) -> tuple[Update, tuple[Contribution, ...]]:
        """No change at all."""
        if self._plan.uplink.takes == "tensors" and self._plan.aggregation.takes != "seeds":
            return TensorUpdate({name: torch.zeros(shape) for name, shape in self._replica.shapes.items()}), ()
        empty = np.zeros(0, np.int64)
        grouped = self._plan.uplink.method_name() == "projection"
        return SeedUpdate(empty, np.zeros(0, np.float32), empty if grouped else None), ()


class Redo:
    """Computes the rounds of one run again, from the first one on and in order."""

    def __init__(
        self, run: Path, ledger: Ledger, replica: Replica, without: str | None = None, state: Path = Path()
    ) -> None:
        """`without`: a client that is left out. `state`: where `self.state` would be saved."""
        self.state = ServerState(state)
        plan = replica.plan
        self._plan, self._replica, self._without = plan, replica, without
        self._shelf = Shelf(run / CONTRIBUTIONS, "always")
        self._guard = Guard(plan, replica, self.state.guard)
        self._lateness = Lateness(plan.recipe, ledger)
        self.rejudges = plan.recipe.defences.enabled and not plan.recipe.clients and _knows_rates(run, plan)

    def kept(self, record: Record) -> bool:
        """Whether what was sent in this round is still there."""
        return not record.contributions or self._shelf.path(record.round).exists()

    def outcome(self, record: Record) -> Outcome:
        """What the round comes to. Raises RunError or WireError when its payloads are not there as they counted."""
        number = record.round
        self._shelf.require(record, self._without)
        parts = {part.client: part for part in record.contributions if part.client != self._without}
        gate = Recorded(not parts or all(part.weight == 0 for part in parts.values()))
        if not parts:
            nobody = cast(Intake, Nobody(self._plan, self._replica))
            return outcome(self._plan, self._replica, self.state, gate, number, nobody)
        guard: Guard = self._guard
        if not self.rejudges:
            guard = AsRecorded(self._plan, self._replica, self.state.guard, parts)
        intake = Intake(
            self._plan,
            number,
            self._lateness,
            guard,
            self._shelf,
            self._replica.context(number),
            lambda client: -1,
            self._plan.aggregation.gather(),
        )
        told = self._shelf.open(number)
        facts: dict[str, Facts] = {
            name: {"round": number - 1, **told[name], "num_examples": part.num_examples, "loss": 0.0}
            for name, part in parts.items()
        }
        for _ in intake.retake(facts):
            pass
        intake.judge()
        if set(intake.answers) != set(parts):
            who = ", ".join(f"{name} ({intake.refused.get(name)})" for name in sorted(set(parts) - set(intake.answers)))
            raise WireError(f"round {number}: counts clients whose payload must be refused: {who}.")
        return outcome(self._plan, self._replica, self.state, gate, number, intake)


def _knows_rates(run: Path, plan: Plan) -> bool:
    """Whether the learning rates, on which bounds depend, follow from what is recorded: a run that was given more
    rounds later had another schedule before."""
    recipe = plan.recipe
    if recipe.lr_schedule == "constant" and not recipe.warmup_frac:
        return True
    return (run / RECIPE).exists() and RunFolder(run).recipe().get("rounds") == recipe.rounds
