"""What `kilotune doctor` finds, as one JSON value."""

from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kilotune.engine.composing.plan import Plan
from kilotune.engine.operations.checks import Check, judged, machine_checks


def examine(
    join: Path | None,
    keys: Path | None,
    plan: Plan | None,
    output: Path,
    histories: tuple[Path, Path] | None = None,
) -> dict[str, Any]:
    """{"ok", "checks": [{"check", "ok", "found", "fix"}]}; `ok` is False when any check failed. `histories`: what two
    clients remember of a run, to be compared."""
    found = [asdict(check) for check in _checks(join, keys, plan, output, datetime.now(UTC))]
    if histories is not None:
        found.append(asdict(_history_check(*histories)))
    return {"ok": all(check["ok"] for check in found), "checks": found}


def _history_check(one: Path, other: Path) -> Check:
    from kilotune.engine.rounds.identity import compare_heads

    found = compare_heads(one, other)
    first, second = found.clients
    if found.agree:
        return judged("histories", True, f"{first} and {second} were shown the same {found.rounds} rounds", "")
    told = f"{first} and {second} were shown different rounds {found.conflict}, both signed by the server"
    return judged("histories", False, told, "Stop, keep both heads.jsonl: they are the proof. Ask the server's owner.")


def _checks(join: Path | None, keys: Path | None, plan: Plan | None, output: Path, now: datetime) -> Iterator[Check]:
    yield from machine_checks(plan, output)
    if keys is not None:
        from kilotune.engine.operations.keychecks import key_checks

        yield from key_checks(keys, now)
    if join is not None:
        from kilotune.engine.operations.reach import join_checks

        yield from join_checks(join, now)
