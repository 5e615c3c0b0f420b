"""Outcome: what a round comes to, as the bytes that everybody decodes and applies.

The clients' answers are combined, the server's optimizer takes its step with the result, the gate may object, and the
downlink codec encodes. What these remember from round to round is the server's state: saved before the round is
committed, and taken back when the round is rejected.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from kilotune.core.types import SeedUpdate, State, TensorUpdate, Update
from kilotune.engine.composing.plan import Plan
from kilotune.engine.files import read_tensors, write_tensors
from kilotune.engine.rounds.gate import Gate, nothing
from kilotune.engine.rounds.intake import Intake
from kilotune.engine.rounds.ledger import Contribution
from kilotune.engine.rounds.replica import Replica, coordinates
from kilotune.engine.rounds.tally import COUNTED, Tally, outer_step
from kilotune.engine.secure.rounds import SecureRound


class ServerState:
    """`folder`/server-NNNNN.safetensors: what the parts remember after a round; the last two rounds are kept."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.aggregation: State = {}
        self.optimizer: State = {}
        self.downlink: State = {}
        self.guard: State = {}
        self.arms: State = {}

    def save(self, number: int, tally: Tally) -> None:
        """The state after a round, and what was counted so far."""
        tensors = {f"{owner}/{key}": v for owner, state in self._owners().items() for key, v in state.items()}
        counts = {key: str(getattr(tally, key)) for key in COUNTED}
        write_tensors(self._path(number), tensors, {"round": str(number), **counts})
        self._path(number - 2).unlink(missing_ok=True)

    def load(self, number: int, tally: Tally) -> None:
        """Go on from `save`."""
        tensors, facts = read_tensors(self._path(number))
        for key in COUNTED:
            setattr(tally, key, int(facts[key]))
        for path, value in tensors.items():
            owner, _, key = path.partition("/")
            self._owners()[owner][key] = value

    def copied(self) -> dict[str, State]:
        """What a rejected round must leave as it was."""
        owners = ("aggregation", "optimizer", "downlink")
        return {o: {k: v.clone() for k, v in self._owners()[o].items()} for o in owners}

    def take_back(self, copied: dict[str, State]) -> None:
        """As it was when `copied` was called."""
        for owner, state in copied.items():
            self._owners()[owner].clear()
            self._owners()[owner].update(state)

    def _owners(self) -> dict[str, State]:
        return {
            "aggregation": self.aggregation,
            "optimizer": self.optimizer,
            "downlink": self.downlink,
            "guard": self.guard,
            "arms": self.arms,
        }

    def _path(self, number: int) -> Path:
        return self._folder / f"server-{number:05d}.safetensors"


@dataclass(frozen=True)
class Outcome:
    """What goes into the ledger for a round."""

    payload: bytes
    contributions: tuple[Contribution, ...]
    rejected: str | None = None  # why the gate turned the round into a change of zero


def outcome(
    plan: Plan, replica: Replica, state: ServerState, gate: Gate, number: int, intake: Intake | SecureRound
) -> Outcome:
    """Combine, step, try, encode. The replica stays as it is."""
    before = state.copied() if gate.closed else {}
    combined, contributions = intake.combine(state.aggregation)
    combined = _travelling(plan, number, combined)
    stepped = outer_step(plan.server_optimizer, combined, state.optimizer)
    payload = _encoded(plan, replica, number, stepped, state.downlink)
    why = gate.objection(number, payload)
    if why is None:
        return Outcome(payload, contributions)
    state.take_back(before)
    payload = _encoded(plan, replica, number, nothing(combined), {})
    return Outcome(payload, tuple(replace(part, weight=0.0) for part in contributions), why)


def _travelling(plan: Plan, number: int, update: Update) -> Update:
    """What the round may change; the rest stays, and what the optimizer remembers of it, too."""
    if isinstance(update, SeedUpdate):
        return update
    return TensorUpdate({name: update.tensors[name] for name in plan.downlink.travels(update.tensors, number)})


def _encoded(plan: Plan, replica: Replica, number: int, update: Update, downlink: State) -> bytes:
    if isinstance(update, SeedUpdate) and plan.downlink.takes == "tensors" and plan.basis is not None:
        update = coordinates(plan, update)
    return plan.downlink.encode(update, replica.context(number), downlink)
