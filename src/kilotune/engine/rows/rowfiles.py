"""Data files record by record: JSON, JSON Lines, CSV, TSV and Parquet, plain or gzipped, each with its place."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from kilotune.core.errors import DataError
from kilotune.core.registry import nearest

Record = dict[str, Any]
Numbered = tuple[int, Record]
"""A record and its place: the line of a JSON file (1-based), the row of a table (1-based, without the header)."""

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev"), "valid"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SPACE = re.compile(r"[\s,]*")


def ending(path: Path) -> str:
    """The file's type with an optional .gz: '.jsonl', '.csv.gz', ...; '' when it is none of ours."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packed = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if packed else suffixes)[-1:]
    if not kind or kind[0] not in ENDINGS or (packed and kind[0] == ".parquet"):
        return ""
    return kind[0] + (".gz" if packed else "")


def split_of_name(path: Path) -> str | None:
    """The split that a file's name says: train.jsonl, test-00000-of-00001.parquet; None when it says nothing."""
    return SPLITS.get(re.split(r"[^a-z]", path.name.lower(), maxsplit=1)[0])


def missing_file(path: Path) -> DataError:
    """The error for a path that does not exist, with the nearest name that does."""
    folder = path.parent
    known = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    hint = nearest(path.name, known) or " Check the path."
    place = "" if folder.is_dir() else f" (there is no folder {str(folder)!r})"
    return DataError(f"{path}: no such file or folder{place}, expected a data file.{hint}")


def files_of(path: Path) -> list[tuple[Path, str | None]]:
    """The data files at a path with the split of each: the file itself, or a folder's train/valid/test files."""
    if not path.exists():
        raise missing_file(path)
    if path.is_file():
        return [(path, None)]
    data = sorted(entry for entry in path.iterdir() if entry.is_file() and ending(entry))
    named = [(entry, split_of_name(entry)) for entry in data if split_of_name(entry)]
    if not named:
        found = ", ".join(entry.name for entry in data[:5]) or "no data file"
        raise DataError(f"{path}: found {found}, expected files named train, valid or test. Name one file instead.")
    return sorted(named, key=lambda item: (("train", "valid", "test").index(str(item[1])), item[0].name))


def read_records(path: Path) -> Iterator[Numbered]:
    """The records of one file in order. Raises DataError with file and line."""
    kind = ending(path)
    if not kind:
        raise DataError(
            f"{path}: got a file ending in {path.suffix or 'nothing'!r}, expected one of {', '.join(ENDINGS)} "
            "(all but .parquet also with .gz)."
        )
    try:
        if kind == ".parquet":
            yield from _parquet(path)
            return
        raw = gzip.open(path, "rb") if kind.endswith(".gz") else open(path, "rb")  # noqa: SIM115 (closed below)
        with raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
            reader = {".json": _json, ".csv": _table, ".tsv": _table}.get(kind.removesuffix(".gz"), _lines)
            yield from reader(path, file)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}). Save the file as UTF-8.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}). Copy or pack it again.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}). Check its permissions.") from None


def _record(path: Path, line: int, value: Any) -> Numbered:
    if not isinstance(value, dict):
        raise DataError(f"{path}:{line}: got a JSON {type(value).__name__}, expected an object with named fields.")
    return line, value


def _bad_json(path: Path, line: int, error: Exception) -> DataError:
    if isinstance(error, json.JSONDecodeError):
        return DataError(f"{path}:{line}: not valid JSON: {error.msg} at column {error.colno}. Correct the line.")
    return DataError(f"{path}:{line}: not valid JSON: {error}. Correct the line.")


def _lines(path: Path, file: TextIO) -> Iterator[Numbered]:
    """JSON Lines: one object a line; empty lines are passed over."""
    for number, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _bad_json(path, number, error) from None
        yield _record(path, number, value)


def _json(path: Path, file: TextIO) -> Iterator[Numbered]:
    """One array of objects, or objects after each other; each is placed at the line where it starts."""
    text = file.read()
    decoder = json.JSONDecoder()
    position = len(text) - len(text.lstrip())
    array = text[position : position + 1] == "["
    position += array
    line, counted = 1, 0
    while True:
        position = _SPACE.match(text, position).end()  # type: ignore[union-attr]  # it matches nothing, too
        line, counted = line + text.count("\n", counted, position), position
        if position == len(text) and not array:
            return
        if array and text[position : position + 1] == "]":
            if rest := text[position + 1 :].strip():
                raise DataError(f"{path}:{line}: not valid JSON: {rest[:20]!r} after the end of the array.")
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _bad_json(path, error.lineno, error) from None
        except (ValueError, RecursionError) as error:
            raise _bad_json(path, line, error) from None
        yield _record(path, line, value)


def _table(path: Path, file: TextIO) -> Iterator[Numbered]:
    """CSV or TSV with a header of field names."""
    table = csv.DictReader(file, dialect="excel-tab" if ".tsv" in path.suffixes else "excel", strict=True)
    number = 0
    try:
        for number, row in enumerate(table, 1):
            fields = len(table.fieldnames or ())
            if None in row or None in row.values():
                got = fields + len(row[None]) if None in row else sum(value is not None for value in row.values())
                raise DataError(f"{path}:{number}: got {got} cells, expected {fields} as in the header. Quote commas.")
            yield number, dict(row)
    except csv.Error as error:
        raise DataError(f"{path}:{number + 1}: not valid CSV: {error}. Correct the row.") from None


def _parquet(path: Path) -> Iterator[Numbered]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}:{number + 1}: not a whole Parquet file ({error}). Copy or write it again.") from None
