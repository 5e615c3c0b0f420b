"""Files that survive a crash: written beside, synced, then renamed; and one clear line when the disk is full."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from kilotune.core.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one line with the fix."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"{path}: the disk is full. Free some space and run the same command again; "
                "every finished round is kept."
            ) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise RunError(f"{path}: cannot be written ({error.strerror}). Choose another folder.") from None
        if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
            raise RunError(f"{path}: {error.strerror}: {error.filename}. Choose another place.") from None
        raise


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write to; then the file is replaced in one step: a reader sees the old content or the new, no part."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            yield beside
            with open(beside, "r+b") as file:
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file's content."""
    with _replacing(path) as beside:
        beside.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    write_bytes(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def append_line(path: Path, line: bytes) -> None:
    """Add one line and sync it; a crash leaves at most a line without its end, which the next call removes."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            _remove_cut_line(file)
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _remove_cut_line(file: BinaryIO) -> None:
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read() != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def write_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    """Tensors and a few words about them as one safetensors file, which is never in memory as a whole."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with _replacing(path) as beside:
        try:
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, beside, metadata=facts)
        except SafetensorError as error:  # the system's refusal, as words
            if "No space left" not in str(error):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `write_tensors` wrote. Raises RunError when the file is gone or is something else."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(str(path), framework="pt") as file:
            facts = dict(file.metadata() or {})
        return load_file(str(path)), facts
    except FileNotFoundError:
        raise RunError(f"{path}: missing, so the run cannot go on. Put it back, or use another --output.") from None
    except SafetensorError as error:
        raise RunError(f"{path}: cut or foreign ({error}). Put it back, or use another --output.") from None
