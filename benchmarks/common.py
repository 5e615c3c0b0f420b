"""What the benchmarks share: run a recipe through the command line, describe the machine, write tables."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil


def run_recipe(recipe: str, overrides: list[str], output: Path) -> dict[str, Any]:
    """The summary of `kilotune tune` or `federate`; a finished run is read, an unfinished one goes on."""
    from kilotune.engine.composing.compose import read

    summary = output / "summary.json"
    if not summary.exists():
        command = "tune" if read(recipe).get("steps") else "federate"
        sets = [word for assignment in overrides for word in ("--set", assignment)]
        words = [sys.executable, "-m", "kilotune", command, recipe, *sets, "--output", str(output), "--format", "json"]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    content: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
    return content


def fresh(output: Path) -> None:
    """Forget earlier runs."""
    shutil.rmtree(output, ignore_errors=True)


def environment() -> dict[str, str]:
    """The machine and the versions behind the numbers."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "flwr", "numba")}
    return {
        "cpu": f"{os.cpu_count()} cores, {platform.machine()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
        **versions,
    }


def figure(label: str, summary: dict[str, Any]) -> str:
    """One run on one line."""
    after = summary["eval"]["after"]
    exact = "" if after["exact_match"] is None else f"  exact match {after['exact_match']:6.1%}"
    return f"{label:32s} loss {after['loss']:.3f}{exact}  {summary['seconds']:.0f} s"


def write_table(path: Path, title: str, columns: list[str], rows: list[list[str]], notes: list[str]) -> None:
    """A Markdown table with the machine and the notes below it; `path` without ending also gets a JSON twin."""
    facts = environment()
    lines = [f"# {title}", "", "| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", *notes, "", "; ".join(f"{key} {value}" for key, value in facts.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    table = [dict(zip(columns, row, strict=True)) for row in rows]
    content = {"title": title, "rows": table, "notes": notes, "environment": facts}
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


PATIENCE_S = 900


def alone(script: str, part: str, *words: object) -> dict[str, Any]:
    """A script's `--part` in a process of its own; the JSON it prints last."""
    command = [sys.executable, str(Path(script).resolve()), "--part", part, *map(str, words)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=PATIENCE_S)
    content: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return content


# -- ours against a baseline ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """One line of benchmarks/results.md: a ratio measured in one run, and what it should be."""

    what: str
    ours: str  # with its unit, e.g. "0.12 s"
    baseline: str  # what it is compared with, and its figure
    ratio: float
    target: float
    better: Literal["lower", "higher"]  # which side of the target is a hit
    spread: str = ""  # e.g. "5 pairs, 0.11-0.14 s"
    headline: bool = False  # one of the few lines the README shows

    @property
    def hit(self) -> bool:
        return self.ratio <= self.target if self.better == "lower" else self.ratio >= self.target

    def cells(self) -> list[str]:
        sign = "≤" if self.better == "lower" else "≥"
        verdict = "hit" if self.hit else "miss"
        return [
            self.what,
            self.ours,
            self.baseline,
            f"{self.ratio:.3g}",
            f"{sign} {self.target:g}",
            verdict,
            self.spread,
        ]


COLUMNS = ["what", "ours", "baseline", "ratio", "target", "", "spread"]


def paired_seconds(
    ours: Callable[[], object], baseline: Callable[[], object], pairs: int = 5
) -> tuple[list[float], list[float]]:
    """Seconds of both, in turns so that a busy spell of the machine meets both; one untimed call of each first."""
    times: tuple[list[float], list[float]] = ([], [])
    for run in (ours, baseline):
        run()
    for _ in range(pairs):
        for run, taken in zip((ours, baseline), times, strict=True):
            started = time.perf_counter()
            run()
            taken.append(time.perf_counter() - started)
    return times


def write_measurements(output: Path, title: str, rows: list[Measurement], notes: list[str]) -> None:
    """`output`.json for benchmarks/results.py, and the same as a table on the terminal and in `output`.md."""
    write_table(output, title, COLUMNS, [row.cells() for row in rows], notes)
    path = output.with_suffix(".json")
    content = json.loads(path.read_text(encoding="utf-8"))
    content["headlines"] = [row.cells() for row in rows if row.headline]
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
