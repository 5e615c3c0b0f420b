"""Withdraw: a new run without one client's part, and a signed certificate of it. The old run stays as it is.

subtract: every round is combined again from the other clients' payloads (redo). Exact for what the client sent; the
others' later payloads were computed on weights that held it, and stay.
replay: the rounds before the client first took part, bit for bit; the run goes on from there without it. Nothing the
client sent has touched what is kept.
"""

import shutil
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from kilotune import __version__
from kilotune.core.errors import IncompatibleError, RunError, WireError
from kilotune.core.registry import nearest
from kilotune.engine.afterwards import certificate
from kilotune.engine.afterwards.redo import CONTRIBUTIONS, Redo, Shelf
from kilotune.engine.afterwards.withdrawn import WITHDRAWN, exclude, withdrawn
from kilotune.engine.cache import staged_folder
from kilotune.engine.composing.plan import Plan
from kilotune.engine.flower.certificates import new_key
from kilotune.engine.flower.keys import load_server_keys
from kilotune.engine.model.base import weights_digest
from kilotune.engine.model.tuned import from_ledger, plan_of
from kilotune.engine.reporting.report import write_report
from kilotune.engine.rounds.book import append_entry
from kilotune.engine.rounds.ledger import LEDGER, Contribution, Ledger
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rounds.tally import Tally
from kilotune.engine.runfolder import RECIPE, RunFolder
from kilotune.engine.session import Emit, write_outputs

How = Literal["subtract", "replay"]
ABOUT_ROUNDS = ("clients", "client", "guard", "round", "rejected", "evaluation")  # events that stay with their rounds

STATEMENTS = {
    "subtract": (
        "Every payload of the client was left out and each round combined again from the others' payloads. This is "
        "exact for what the client sent. It is approximate for its later influence: in the rounds after its first, the "
        "others computed their payloads on weights that held its part."
    ),
    "replay": (
        "The run was taken back to the last round before the client first took part. This is exact: nothing of what is "
        "kept depends on anything the client sent."
    ),
}


@dataclass(frozen=True)
class Source:
    """A run that somebody withdraws from."""

    path: Path
    ledger: Ledger
    plan: Plan
    client: str

    @property
    def parts(self) -> dict[int, Contribution]:
        """The client's part in each round it counted in."""
        found = ((r.round, c) for r in self.ledger.records for c in r.contributions)
        return {number: part for number, part in found if part.client == self.client}


def withdraw(
    run: Path, client: str, output: Path, how: How, keys: Path | None, base_name: str | None, emit: Emit
) -> dict[str, Any]:
    """Write the new run folder with its certificate; returns the certificate and where it is."""
    source = _source(run, client, how)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(f"{output}: there is something already. Choose another --output.")
    emit({"event": "status", "text": f"replaying {len(source.ledger)} rounds of {run}"})
    old = weights_digest(from_ledger(source.ledger, base_name).state())
    with staged_folder(output) as stage:
        ledger = Ledger.open(stage, source.ledger.header)
        replica = from_ledger(Ledger(source.ledger.header), base_name).replica
        assert replica is not None, "a ledger has a plan"
        emit({"event": "status", "text": f"{how}: rounds without {client}"})
        (_subtracted if how == "subtract" else _rolled_back)(source, ledger, replica, stage)
        _carry_over(source, stage, len(ledger), how)
        replica.replay((record.round, payload) for record, payload in ledger.since(0))
        content = _content(source, ledger, how, old, replica.digest())
        signed = _signed(content, keys)
        name = f"withdrawal-{len(list(stage.glob('withdrawal-*.json'))) + 1:03d}.json"
        certificate.write(stage / name, signed)
        new_run = RunFolder(stage)
        new_run.record({"event": "withdrawal", "client": client, "how": how, "rounds": sorted(source.parts)})
        if len(ledger):
            write_outputs(new_run, source.plan, replica, ledger)
    write_report(RunFolder(output))
    return {"output": str(output), "certificate": str(output / name), **signed}


def exclude_live(run: Path, client: str) -> None:
    """Have a run ask this client no more, a server at work included."""
    if not (run / LEDGER).exists():
        raise RunError(f"{run}: no {LEDGER} there, so it is no run folder.")
    exclude(run, client)


def verify(path: Path, run: Path | None, signer: str | None, base_name: str | None, emit: Emit) -> dict[str, Any]:
    """Check a certificate, and the new run against it. Raises WireError with the first thing that does not fit.

    `signer`: the fingerprint the certificate's key must have.
    """
    found = certificate.read(path)
    if signer is not None and found["fingerprint"] != signer.lower().replace(":", ""):
        raise WireError(f"{path}: signed by key {found['fingerprint']}, expected {signer}.")
    checked = ["signature"] + (["signer"] if signer else [])
    if run is not None:
        emit({"event": "status", "text": f"replaying {run}"})
        _require_same_run(path, found, run, base_name)
        checked += ["head", "digest", "base", "absence of the client"]
    return {"certificate": str(path), "checked": checked, **found}


def _require_same_run(path: Path, found: dict[str, Any], run: Path, base_name: str | None) -> None:
    """The run begins with the rounds that the certificate speaks of, and the client is in none of its rounds."""
    ledger = Ledger.load(run)
    if (ledger.header.base_digest, ledger.header.recipe_id) != (found["base_digest"], found["recipe_id"]):
        raise WireError(f"{path}: is about another base or recipe than {run}.")
    if len(ledger) < found["rounds"] or ledger.head_at(found["rounds"]) != found["new"]["head"]:
        raise WireError(f"{path}: is about another run than {run}: round {found['rounds']} has another head there.")
    again = [r.round for r in ledger.records for c in r.contributions if c.client == found["client"]]
    if again:
        raise WireError(f"{run}: client {found['client']!r} takes part again in round {again[0]}.")
    shelf = Shelf(run / CONTRIBUTIONS)
    kept = [number for number in range(1, len(ledger) + 1) if found["client"] in shelf.open(number)]
    if kept:
        raise WireError(f"{shelf.path(kept[0])}: still holds what client {found['client']!r} sent.")
    part = Ledger(ledger.header)
    for record, payload in ledger.since(0):
        if record.round <= found["rounds"]:
            part.append(record.root, payload, record.contributions)
    digest = weights_digest(from_ledger(part, base_name).state())
    if digest != found["new"]["digest"]:
        raise WireError(f"{run}: its rounds lead to weights {digest[:16]}, certified {found['new']['digest'][:16]}.")


# -- what may be withdrawn from ---------------------------------------------------------------------------------------


def _source(run: Path, client: str, how: How) -> Source:
    if not (run / LEDGER).exists():
        raise RunError(f"{run}: no {LEDGER} there. Name the server's run folder; a seed file holds no contributions.")
    ledger = Ledger.load(run)
    source = Source(run, ledger, plan_of(ledger.header.recipe), client)
    recipe, privacy = source.plan.recipe, source.plan.privacy
    if privacy is not None and privacy.unit == "client":
        raise IncompatibleError(
            f"{run}: with privacy {privacy.method_name()!r} the ledger names nobody, so that nobody's part can be told "
            f"apart: what one client could change is bounded by epsilon {privacy.epsilon:g}. To forget more than that, "
            "federate again without it."
        )
    names = sorted({c.client for r in ledger.records for c in r.contributions})
    if client not in names:
        raise RunError(f"{run}: got client {client!r}, expected one of {', '.join(names)}.{nearest(client, names)}")
    if how == "subtract" and recipe.secure_aggregation.enabled:
        raise IncompatibleError(
            f"{run}: secure aggregation showed the server sums only, so no client's part can be subtracted. "
            "Use --how replay."
        )
    return source


# -- the new rounds ---------------------------------------------------------------------------------------------------


def _subtracted(source: Source, ledger: Ledger, replica: Replica, stage: Path) -> None:
    """Every round anew. It has to come to what was committed when nobody is left out, or nothing is certain."""
    whole = Redo(source.path, source.ledger, replica)
    rest = Redo(source.path, source.ledger, replica, source.client, stage / "state")
    for record, payload in source.ledger.since(0):
        if whole.outcome(record).payload != payload:
            raise WireError(
                f"{source.path}: round {record.round} cannot be told apart: its contributions do not combine to what "
                "was committed. See kilotune replay --audit, or use --how replay."
            )
        result = rest.outcome(record)
        ledger.append(record.root, result.payload, result.contributions)
        _copy_book(source, stage, record.round)
    rest.state.save(len(ledger), Tally())


def _rolled_back(source: Source, ledger: Ledger, replica: Replica, stage: Path) -> None:
    """The rounds before the client's first, with what the server remembered after them."""
    keep = min(source.parts) - 1
    redo = Redo(source.path, source.ledger, replica, state=stage / "state")
    books = not source.plan.recipe.secure_aggregation.enabled
    books = books and all(redo.kept(record) for record in source.ledger.records[:keep])
    for record, payload in source.ledger.since(0):
        if record.round > keep:
            break
        if books and redo.outcome(record).payload != payload:
            raise WireError(
                f"{source.path}: round {record.round}: its contributions do not combine to what was committed. "
                "See kilotune replay --audit."
            )
        ledger.append(record.root, payload, record.contributions)
        _copy_book(source, stage, record.round)
    if keep:
        redo.state.save(keep, Tally())


def _copy_book(source: Source, stage: Path, number: int) -> None:
    """What the others sent that counted, so that the next one can withdraw, too."""
    shelf = Shelf(source.path / CONTRIBUTIONS)
    if not shelf.path(number).exists():
        return
    counted = {c.client for c in source.ledger.records[number - 1].contributions} - {source.client}
    for entry in shelf.entries(number):
        if entry.client in counted:
            append_entry(stage / CONTRIBUTIONS / shelf.path(number).name, entry)


def _carry_over(source: Source, stage: Path, keep: int, how: How) -> None:
    """Recipe, earlier withdrawals, what simulated clients remember, and the events of rounds that are kept as they
    were."""
    for path in [source.path / RECIPE, source.path / WITHDRAWN, *source.path.glob("withdrawal-*.json")]:
        if path.exists():
            shutil.copy2(path, stage / path.name)
    run = RunFolder(stage)
    if not (stage / RECIPE).exists():
        run.write_recipe(source.plan)
    exclude(stage, source.client)
    gone = withdrawn(stage)
    for path in (source.path / "clients").glob("*/state-*.safetensors"):
        if path.parent.name not in gone and int(path.stem.split("-")[1]) <= keep:
            target = stage / "clients" / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
    for event in RunFolder(source.path).events() if how == "replay" else ():
        if event["event"] in ABOUT_ROUNDS and event.get("round", 0) <= keep and event.get("client") not in gone:
            run.record(_scrubbed(event, gone))


def _scrubbed(value: Any, gone: set[str]) -> Any:
    """Without what is said of those who left."""
    if isinstance(value, dict):
        return {key: _scrubbed(part, gone) for key, part in value.items() if key not in gone}
    if isinstance(value, list):
        return [_scrubbed(part, gone) for part in value if not (isinstance(part, dict) and part.get("client") in gone)]
    return value


# -- the certificate --------------------------------------------------------------------------------------------------


def _content(source: Source, ledger: Ledger, how: How, old_digest: str, new_digest: str) -> dict[str, Any]:
    kept = [mine.hash == theirs.hash for mine, theirs in zip(ledger.records, source.ledger.records, strict=False)]
    return {
        "client": source.client,
        "how": how,
        "statement": STATEMENTS[how],
        "removed": [{"round": number, **_told(part)} for number, part in sorted(source.parts.items())],
        "rounds_kept": kept.index(False) if False in kept else len(kept),
        "rounds": len(ledger),
        "base_digest": source.ledger.header.base_digest,
        "recipe_id": source.ledger.header.recipe_id,
        "old": {"head": source.ledger.head, "digest": old_digest, "rounds": len(source.ledger)},
        "new": {"head": ledger.head, "digest": new_digest},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
    }


def _told(part: Contribution) -> dict[str, Any]:
    return {key: value for key, value in asdict(part).items() if key != "client"}


def _signed(content: dict[str, Any], keys: Path | None) -> dict[str, Any]:
    if keys is None:
        return certificate.signed(content, new_key(), "a key made for this certificate and not kept")
    server = load_server_keys(keys)
    return certificate.signed(content, server.signing_key(), f"server of federation {server.federation}")
