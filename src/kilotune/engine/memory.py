"""Memory: what is free for this process, and refusing a model that will not fit before a byte of it is loaded."""

import os
from functools import cache
from pathlib import Path

import psutil

from kilotune.core.errors import ModelError

__all__ = ["check_memory", "free_bytes", "peak_rss"]

HEADROOM = 1.05  # tokenizer, buffers and the first activations
CGROUPS = (  # (limit, usage, statistics) of a container, version 2 and version 1
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def free_bytes(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes this process may still take: the machine's, or its container's when that is less."""
    free = int(psutil.virtual_memory().available)
    for limit_file, usage_file, stat_file in CGROUPS:
        limit = _number(root / limit_file)
        if limit is not None:
            used = (_number(root / usage_file) or 0) - _reclaimable(root / stat_file)
            free = min(free, max(0, limit - used))
    return free


def check_memory(name: str, needed: int, limit_bytes: int | None = None) -> None:
    """Raises ModelError when a base of `needed` bytes does not fit into `limit_bytes`, or into what is free."""
    free = free_bytes() if limit_bytes is None else limit_bytes
    if needed * HEADROOM > free:
        raise ModelError(
            f"base {name!r} needs {needed / 1e9:.1f} GB in float32, {free / 1e9:.1f} GB are free. "
            "Use a smaller base or free memory."
        )


def peak_rss() -> int:
    """Peak resident bytes of this process so far."""
    import resource

    return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, _process(os.getpid()).memory_info().rss)


@cache
def _process(pid: int) -> psutil.Process:
    return psutil.Process(pid)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _reclaimable(path: Path) -> int:
    """File pages that the kernel drops when memory is asked for."""
    try:
        facts = dict(line.split() for line in path.read_text(encoding="ascii").splitlines())
        return int(facts.get("total_inactive_file", facts.get("inactive_file", 0)))
    except (OSError, ValueError):
        return 0
