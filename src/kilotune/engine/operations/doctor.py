"""What `kilotune doctor` finds, as one JSON value."""

from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kilotune.engine.compose import Plan
from kilotune.engine.operations.checks import Check, machine_checks


def examine(join: Path | None, keys: Path | None, plan: Plan | None, output: Path) -> dict[str, Any]:
    """{"ok", "checks": [{"check", "ok", "found", "fix"}]}; `ok` is False when any check failed."""
    found = [asdict(check) for check in _checks(join, keys, plan, output, datetime.now(UTC))]
    return {"ok": all(check["ok"] for check in found), "checks": found}


def _checks(join: Path | None, keys: Path | None, plan: Plan | None, output: Path, now: datetime) -> Iterator[Check]:
    yield from machine_checks(plan, output)
    if keys is not None:
        from kilotune.engine.operations.keychecks import key_checks

        yield from key_checks(keys, now)
    if join is not None:
        from kilotune.engine.operations.reach import join_checks

        yield from join_checks(join, now)
