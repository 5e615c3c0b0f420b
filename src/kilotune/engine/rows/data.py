"""Rows: what a data path holds, who owns which row, and a digest over all of it.

A path is a file, a folder with train/valid/test files, a hub id, or the embedded set `households` (`households:3`
for its first three homes).
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kilotune.core.errors import DataError
from kilotune.core.registry import find, names
from kilotune.core.rng import stream
from kilotune.engine.rows import households
from kilotune.engine.rows.rowfiles import ENDINGS, SPLITS, Record, files_of, missing_file, read_records
from kilotune.format import Format, Sample
from kilotune.partition import Partition

__all__ = [
    "Progress",
    "Row",
    "data_digest",
    "default_partition",
    "load_rows",
    "partition",
    "partition_counts",
    "read_sample",
    "select",
]

Progress = Callable[[int, int], None]
"""Called with (done, total) from time to time; total is 0 where nobody knows it."""

Found = tuple[str, int, Record, str | None]
"""File, line, record and the split that the file's name says."""

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
PROGRESS_EVERY = 1000


@dataclass(frozen=True, slots=True)
class Row:
    """One record and where it comes from. `line` counts from 1: lines of a JSON file, rows of a table."""

    record: Record
    file: str
    line: int
    client: str | None = None
    split: str = "train"

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


def load_rows(path: str, split: str | None = None, progress: Progress | None = None) -> list[Row]:
    """All rows of a path, or those of one split (train, valid, test). Raises DataError that names file and line."""
    rows: list[Row] = []
    for file, line, record, default in _records(path):
        rows.append(_row(file, line, record, default))
        if progress and len(rows) % PROGRESS_EVERY == 0:
            progress(len(rows), 0)
    if not rows:
        raise DataError(f"{path}: got no rows, expected at least one record. Check that the file is not empty.")
    return rows if split is None else select(rows, split, path)


def select(rows: Sequence[Row], split: str, path: str = "data") -> list[Row]:
    """The rows of one split. Raises DataError that counts the splits there are."""
    wanted = SPLITS.get(split)
    chosen = [row for row in rows if row.split == wanted]
    if not chosen:
        found = ", ".join(f"{count} {name}" for name, count in sorted(Counter(r.split for r in rows).items()))
        raise DataError(f"{path}: got no row of split {split!r}, found {found}. Choose one of these.")
    return chosen


def _records(path: str) -> Iterator[Found]:
    """(file, line, record, default split) of everything at a path."""
    if path.split(":")[0] == "households" and not os.path.exists(path):
        count = path.partition(":")[2]
        if count and not count.isdecimal():
            raise DataError(f"{path}: got {count!r} households, expected a number as in households:3.")
        made = households.generate(households=int(count)) if count else households.generate()
        yield from ((path, line, record, None) for line, record in enumerate(made, 1))
        return
    known = path.lower().removesuffix(".gz").endswith(ENDINGS)
    if path.startswith("hub:") or (not os.path.exists(path) and not known and _HUB.fullmatch(path)):
        yield from _hub(path)
        return
    for file, default in files_of(Path(path).expanduser()):
        empty = True
        for line, record in read_records(file):
            empty = False
            yield str(file), line, record, default
        if empty:
            raise DataError(f"{file}: got an empty file, expected at least one record.")


def _hub(path: str) -> Iterator[Found]:
    """Rows of a data set of the hub, `org/name` or `hub:org/name:config`, through `datasets`."""
    name, _, config = path.removeprefix("hub:").partition(":")
    if not path.startswith("hub:") and Path(name).parent.is_dir():
        raise missing_file(Path(path))  # its folder is here, so it is a misspelt file
    import datasets

    try:
        found = datasets.load_dataset(name, config or None)
    except Exception as error:  # the library raises whatever its many back ends raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{path}: no such file here, and the hub did not give a data set of this name ({reason}). "
            "Check the path; for a hub id, check the name and the connection."
        ) from error
    for split, part in found.items():
        for line, record in enumerate(part, 1):
            yield f"{path}/{split}", line, record, SPLITS.get(re.split(r"[^a-z]", str(split).lower())[0])


def _row(file: str, line: int, record: Record, default: str | None) -> Row:
    said = record.get("split")
    split = SPLITS.get(said.lower()) if isinstance(said, str) else None
    if said not in (None, "") and split is None:
        raise DataError(f"{file}:{line}: field 'split': got {said!r}, expected train, valid or test.")
    client = record.get("client")
    if client is not None and not isinstance(client, str | int):
        raise DataError(f"{file}:{line}: field 'client': got {type(client).__name__}, expected a name.")
    return Row(record, file, line, None if client in (None, "") else str(client), split or default or "train")


def read_sample(row: Row, layout: str = "auto") -> Sample:
    """The conversation of a row, by its fields or by a forced format. Raises DataError with file and line."""
    method = _detect(row) if layout == "auto" else _format(layout)
    try:
        sample: Sample = method().read(row.record)
    except ValueError as error:
        raise DataError(f"{row.where}: {error}") from None
    return sample


@cache
def _format(name: str) -> type[Format]:
    method: type[Format] = find("format", name, "data.format")
    return method


@cache
def _formats() -> list[type[Format]]:
    return sorted((find("format", name) for name in names("format")), key=lambda method: method.priority)


def _detect(row: Row) -> type[Format]:
    for method in _formats():
        if method.matches(row.record):
            return method
    found = ", ".join(repr(key) for key in row.record) or "no field"
    raise DataError(
        f"{row.where}: found {found}; expected the fields of a known layout: {', '.join(names('format'))}. "
        "Rename the fields (for example to 'instruction' and 'output')."
    )


def default_partition(rows: Sequence[Row]) -> Partition:
    """By `client` when the rows have it, else IID over four clients."""
    by_client = any(row.client is not None for row in rows)
    method: Partition = find("partition", "field")() if by_client else find("partition", "iid")(num_clients=4)
    return method


def _raw(row: Row, field: str) -> Any:
    return row.client if field == "client" else row.record.get(field)


def _value(row: Row, field: str) -> str:
    value = _raw(row, field)
    if value is None:
        found = ", ".join(repr(key) for key in row.record)
        raise DataError(f"{row.where}: field {field!r} is missing; found {found}. The partition reads it.")
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def partition(rows: Sequence[Row], method: Partition | None = None, seed: int = 0) -> dict[str, list[int]]:
    """Client -> indices into `rows` of its training rows; rows of other splits belong to nobody here."""
    method = method or default_partition(rows)
    train = [index for index, row in enumerate(rows) if row.split == "train"]
    if not train:
        raise DataError("data: got no training row, expected rows without a split or with split = train.")
    fields = [{field: _value(rows[index], field) for field in method.fields} for index in train]
    parts = method.split(fields, stream(seed, "partition"))
    return {client: [train[i] for i in part] for client, part in parts.items()}


def partition_counts(
    rows: Sequence[Row], parts: dict[str, list[int]], field: str | None = None
) -> dict[str, dict[str, Any]]:
    """Client -> {"rows": n} and, with a label field, {"labels": {label: n}}, most frequent first."""
    report: dict[str, dict[str, Any]] = {}
    for client, indices in parts.items():
        report[client] = {"rows": len(indices)}
        if field is not None:
            report[client]["labels"] = dict(Counter(_value(rows[i], field) for i in indices).most_common())
    return report


def data_digest(rows: Sequence[Row]) -> str:
    """SHA-256 over the rows in order: client, split and record with sorted keys; file names do not matter."""
    digest = hashlib.sha256()
    for row in rows:
        content = [row.client, row.split, row.record]
        digest.update(json.dumps(content, sort_keys=True, separators=(",", ":"), default=str).encode() + b"\n")
    return digest.hexdigest()
