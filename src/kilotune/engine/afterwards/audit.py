"""Audit: what a run's folder says of every round, checked against itself.

Verified by anyone who has the base: the hash chain; every payload a client sent against the ledger; every round's
combination, computed again from these payloads bit for bit; the weights after each round. Told, not verified, because
only the server saw it: who was refused, missing or cut, bytes on the wire, and epsilon (metrics.jsonl).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kilotune.core.errors import KilotuneError, RunError, WireError
from kilotune.engine.afterwards.redo import CONTRIBUTIONS, Redo, Shelf
from kilotune.engine.afterwards.seedfile import is_seed_file
from kilotune.engine.afterwards.seedfile import read as read_seed_file
from kilotune.engine.composing.plan import Plan
from kilotune.engine.model.evaluation import evaluate
from kilotune.engine.model.tuned import from_ledger
from kilotune.engine.reporting._history import FAILURES
from kilotune.engine.rounds.ledger import Contribution, Ledger, Record
from kilotune.engine.rounds.outcome import Outcome
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rows.data import load_rows
from kilotune.engine.rows.tokenize import encode
from kilotune.engine.runfolder import RunFolder

Emit = Callable[[dict[str, Any]], None]
Facts = dict[str, Any]


def audit(run: Path, base_name: str | None, emit: Emit, public: str | None = None) -> Facts:
    """Every round in order, and everything that does not fit. `public`: rows on which each client's contribution is
    measured. Raises WireError when the chain itself is broken."""
    folder = None if is_seed_file(run) or run.is_file() else run
    ledger = read_seed_file(run) if folder is None else Ledger.load(run)
    emit({"event": "status", "text": f"replaying and checking {len(ledger)} rounds"})
    replica = from_ledger(Ledger(ledger.header), base_name).replica
    assert replica is not None, "a ledger has a plan"
    told = Told(RunFolder(folder).events() if folder is not None else [])
    check = _Check(folder, ledger, replica)
    rounds, problems = [], list[Facts]()
    for record, payload in ledger.since(0):
        found = check.problems(record, payload)
        replica.apply(record.round, payload)
        problems += [{"round": record.round, "what": what} for what in found]
        rounds.append(
            {
                "round": record.round,
                "accepted": [_part(part, check.sizes.get(part.client)) for part in record.contributions],
                **told.about(record.round),
                "payload_bytes": len(payload),
                "recombines": None if check.unchecked else not found,
                "unchecked": check.unchecked,
                "head": record.hash,
                "digest": replica.digest(),
            }
        )
        emit({"event": "progress", "what": "checking", "done": record.round, "total": len(ledger)})
    result = {
        "run": str(run),
        "verified": not problems,
        "rounds": rounds,
        "problems": problems,
        "digest": replica.digest(),
        "ledger_head": ledger.head,
        "base_digest": replica.base.digest,
    }
    if public is not None:
        result |= contributions(run, ledger, public, base_name, emit)
    return result


def _part(part: Contribution, size: int | None) -> Facts:
    return {**part.to_json(), "bytes": size}


class Told:
    """What metrics.jsonl says of a round; of one that was begun twice, what was said last."""

    def __init__(self, events: list[Facts]) -> None:
        self._last = {(e["event"], e.get("round")): e for e in events if e["event"] in ("round", "guard", "rejected")}
        self._clients: dict[tuple[Any, str], Facts] = {}
        for event in events:
            if event["event"] == "client" and "round" in event:
                self._clients[event["round"], event["client"]] = event

    def about(self, number: int) -> Facts:
        """Figures that were not recorded are None."""
        whole, guard = self._last.get(("round", number), {}), self._last.get(("guard", number), {})
        refused = {
            client: str(event.get("why") or FAILURES[event["status"]])
            for (about, client), event in self._clients.items()
            if about == number and event["status"] in FAILURES
        }
        refused |= {str(item["client"]): str(item["why"]) for item in guard.get("refused", [])}
        return {
            "refused": [{"client": client, "why": why} for client, why in sorted(refused.items())],
            "rejected": self._last.get(("rejected", number), {}).get("why"),
            **{key: whole.get(key) for key in ("asked", "up_bytes", "down_bytes", "epsilon")},
            **{key: guard.get(key) for key in ("clipped_scalars", "clipped_norms", "capped_weights")},
        }


class _Check:
    """Computes rounds again, as long as what they hang on is there."""

    def __init__(self, folder: Path | None, ledger: Ledger, replica: Replica) -> None:
        self._plan = replica.plan
        self._redo = None if folder is None else Redo(folder, ledger, replica)
        self._shelf = None if folder is None else Shelf(folder / CONTRIBUTIONS)
        self.unchecked = _uncheckable(folder, replica.plan)  # why rounds cannot be combined again; empty: they can
        self.sizes: dict[str, int] = {}

    def problems(self, record: Record, payload: bytes) -> list[str]:
        """What does not fit in this round."""
        found = []
        if record.root != self._plan.root(record.round):
            found.append(f"root {record.root} does not follow from the recipe's seed")
        self.sizes = {}
        if self._shelf is not None:
            self._shelf.open(record.round)
            self.sizes = self._shelf.sizes()
        if self._redo is None or self.unchecked:
            return found
        try:
            return found + _differences(self._redo.outcome(record), record, payload)
        except RunError as error:
            self.unchecked = str(error)  # what the parts remember is not known from here on
        except KilotuneError as error:
            found.append(str(error))
        return found


def _uncheckable(folder: Path | None, plan: Plan) -> str:
    if folder is None:
        return "a seed file holds no contributions"
    if plan.privacy is not None and plan.privacy.unit == "client":
        return "with noise on the server no round can be computed again, and the ledger names nobody"
    if plan.recipe.secure_aggregation.enabled:
        return "secure aggregation showed the server sums only"
    return ""


def _differences(result: Outcome, record: Record, payload: bytes) -> list[str]:
    again = {part.client: part for part in result.contributions}
    found = [
        f"{key} of client {part.client!r}: the ledger says {said}, the rules give {ours}"
        for part in record.contributions
        for key in ("weight", "scale", "limit")
        if (ours := getattr(again[part.client], key)) != (said := getattr(part, key))
    ]
    if result.payload != payload:
        found.append("its contributions do not combine to the payload that was committed")
    return found


# -- contribution of each client --------------------------------------------------------------------------------------


def contributions(run: Path, ledger: Ledger, public: str, base_name: str | None, emit: Emit) -> Facts:
    """Leave-one-out: the loss on public rows without a client's part minus with it; above 0 it helped.

    Takes one rebuild of the model and one evaluation for each client, and one more.
    """
    names = sorted({part.client for record in ledger.records for part in record.contributions})
    rows = load_rows(public)

    def loss(of: Ledger, what: str) -> float:
        emit({"event": "status", "text": f"measuring {what} on {len(rows)} rows"})
        tuned = from_ledger(of, base_name)
        examples, _ = encode(rows, tuned.base.tokenizer, tuned.data.model_copy(update={"path": public}))
        return evaluate(tuned.model, tuned.base.tokenizer, examples, max_new_tokens=0).overall.loss

    whole = loss(ledger, "the whole run")
    gains = {name: loss(rest_of(run, ledger, name, base_name), f"the run without {name}") - whole for name in names}
    return {"contribution": {"data": public, "loss": whole, "gain": gains}}


def rest_of(run: Path, ledger: Ledger, client: str, base_name: str | None) -> Ledger:
    """The rounds combined again without one client, in memory."""
    tuned = from_ledger(Ledger(ledger.header), base_name)
    assert tuned.replica is not None, "a ledger has a plan"
    why = _uncheckable(run if run.is_dir() else None, tuned.replica.plan)
    if why:
        raise WireError(f"{run}: no contribution can be told apart: {why}.")
    rest, redo = Ledger(ledger.header), Redo(run, ledger, tuned.replica, client)
    for record in ledger.records:
        result = redo.outcome(record)
        rest.append(record.root, result.payload, result.contributions)
    return rest
