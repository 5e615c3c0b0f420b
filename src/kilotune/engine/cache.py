"""Cache: what is made once from large files and kept between runs (converted models, digests).

The folder is $XDG_CACHE_HOME/kilotune or ~/.cache/kilotune and may be deleted at any time.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kilotune.core.errors import RunError
from kilotune.engine.files import disk_errors, write_bytes

__all__ = ["build_folder", "cache_folder", "fingerprint", "remembered", "sha256_file", "staged_folder"]


def cache_folder() -> Path:
    """Where the cache lies."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if root else Path.home() / ".cache") / "kilotune"


def fingerprint(files: Iterable[Path]) -> str:
    """A word that changes when a file is replaced or written to: from paths, sizes and times, not from content."""
    facts = []
    for file in sorted(files):
        stat = file.stat()
        facts.append([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def remembered(what: str, files: Iterable[Path], compute: Callable[[], str]) -> str:
    """`compute()`, or what it returned the last time for these files as they are."""
    path = cache_folder() / what / fingerprint(files)
    if path.is_file():
        return path.read_text(encoding="ascii")
    value = compute()
    with contextlib.suppress(OSError, RunError):  # a cache that cannot be written costs time at the next start, no more
        write_bytes(path, value.encode("ascii"))
    return value


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build_folder(folder: Path, build: Callable[[Path], None]) -> None:
    """Make `folder` by `build(a folder to fill)` unless it is there; one process builds, others wait."""
    if folder.is_dir():
        return
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(folder.name + ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                with staged_folder(folder) as stage:
                    build(stage)


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place when the block ends well and vanishes when it does not."""
    stage = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    for left_over in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        with disk_errors(folder):
            stage.mkdir(parents=True)
            yield stage
            if folder.exists():
                os.replace(folder, old)
            os.replace(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
