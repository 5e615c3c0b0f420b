"""Run folder: everything a run leaves, and what it needs to go on after an interruption.

recipe.yaml (resolved) · ledger.jsonl + payloads/ · metrics.jsonl · state/ and clients/ (for resuming) ·
summary.json · final.seed or adapter/ or model/ · report.html
"""

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from kilotune.core.errors import RunError
from kilotune.engine.composing.plan import Plan
from kilotune.engine.files import append_line, disk_errors, write_bytes, write_json

SYNCED = ("round", "step", "evaluation", "end")
"""Events after which metrics.jsonl is synced. Nothing else hangs on it: what a run resumes from is in the ledger."""
LOADER, DUMPER = getattr(yaml, "CSafeLoader", yaml.SafeLoader), getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""The safe ones, compiled where PyYAML came with libyaml."""
RECIPE, METRICS, SUMMARY, REPORT = "recipe.yaml", "metrics.jsonl", "summary.json", "report.html"


class RunFolder:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics: BinaryIO | None = None  # open while the folder is held
        self._held = False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for one process."""
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            with open(self.path / ".lock", "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise RunError(f"{self.path}: another kilotune process works in this folder.") from None
                self._held = True
                try:
                    yield
                finally:
                    self._held = False
                    if self._metrics is not None:
                        self._metrics.close()
                        self._metrics = None

    def write_recipe(self, plan: Plan) -> None:
        text = yaml.dump(plan.resolved(), Dumper=DUMPER, sort_keys=False, allow_unicode=True)
        write_bytes(self.path / RECIPE, text.encode())

    def record(self, event: dict[str, Any]) -> None:
        """Append one event, with the time in seconds since the epoch."""
        line, path = json.dumps({"time": round(time.time(), 3), **event}).encode(), self.path / METRICS
        if self._metrics is None or event["event"] in SYNCED:
            append_line(path, line)  # which also removes a line that a crash has cut
        else:
            with disk_errors(path):
                self._metrics.write(line + b"\n")
        if self._metrics is None and self._held:
            self._metrics = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by `locked`

    def events(self) -> list[dict[str, Any]]:
        """All events so far; an unfinished last line is left out."""
        path = self.path / METRICS
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1] if line]

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json(self.path / SUMMARY, summary)

    def summary(self) -> dict[str, Any]:
        path = self.path / SUMMARY
        if not path.exists():
            raise RunError(f"{self.path}: the run is not finished (no {SUMMARY}). Run its command again to go on.")
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content

    def recipe(self) -> dict[str, Any]:
        """The resolved recipe of this run."""
        path = self.path / RECIPE
        if not path.exists():
            raise RunError(f"{self.path}: no {RECIPE} there, so it is no run folder.")
        content: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=LOADER)
        return content
