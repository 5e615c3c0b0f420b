"""Book: what the clients sent, round by round, as it came.

`contributions/00001.bin` in a run folder, written while the round is collected: per payload a line of JSON (client,
head of the ledger it answers to, facts, size, CRC-32), then the payload. A server killed in a round need not ask
again who is in its book; after the round the book is what a client's share can be withdrawn from or checked against.
The file is written without waiting for the disk until the round ends; an entry that a crash has cut is left out.
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kilotune.core.errors import RunError
from kilotune.engine.files import disk_errors

Facts = dict[str, str | int | float | bool]
Keep = Literal["auto", "always", "never"]
AUTO_BYTES = 16 << 20  # of a round's book, above which `auto` lets it go


@dataclass(frozen=True, slots=True)
class Entry:
    """One client's answer in a round."""

    client: str
    head: str
    facts: Facts
    payload: bytes


def append_entry(path: Path, entry: Entry) -> int:
    """Add an entry at the end of a file; returns where its payload begins."""
    size, crc = len(entry.payload), zlib.crc32(entry.payload)
    line = {"client": entry.client, "head": entry.head, "facts": entry.facts, "size": size, "crc": crc}
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.write(entry.payload)
            return file.tell() - size


def read_entries(path: Path) -> Iterator[tuple[Entry, int]]:
    """Whole entries and where their payloads begin, up to the first that is cut or altered."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        while line := file.readline():
            try:
                told = json.loads(line)
                size, start = int(told["size"]), file.tell()
                payload = file.read(max(0, size))
                if len(payload) != size or zlib.crc32(payload) != told["crc"]:
                    return
                entry = Entry(str(told["client"]), str(told["head"]), dict(told["facts"]), payload)
            except (ValueError, LookupError, TypeError):
                return
            yield entry, start


def cut_after(path: Path, size: int) -> None:
    """Remove what a crash has left after the last whole entry."""
    if path.exists() and path.stat().st_size > size:
        with disk_errors(path):
            os.truncate(path, size)


class Book:
    """The books of one run."""

    def __init__(self, folder: Path, keep: Keep = "auto", judged: bool = True) -> None:
        """`judged`: a round's payloads are read again when all are there, so they are written in any case."""
        self._folder, self._keep, self._writes = folder, keep, judged or keep != "never"
        self._path = folder
        self._head = ""
        self._places: dict[str, tuple[int, int]] = {}  # of the payloads of the open round: (start, size)

    def open(self, number: int, head: str) -> dict[str, Facts]:
        """Start a round, or go on with it: the facts of those who had answered after this very history, by client."""
        self._path, self._head, self._places = self.path(number), head, {}
        found: dict[str, Facts] = {}
        end = 0
        for entry, start in read_entries(self._path):
            if entry.head != head:
                break
            end = start + len(entry.payload)
            self._places[entry.client] = (start, len(entry.payload))
            found[entry.client] = entry.facts
        cut_after(self._path, end)
        return found

    def add(self, client: str, facts: Facts, payload: bytes) -> None:
        """Write an answer of the open round."""
        if not self._writes:
            return
        start = append_entry(self._path, Entry(client, self._head, facts, payload))
        self._places[client] = (start, len(payload))

    def payloads(self, clients: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """(client, payload) of the open round, in the order asked for; one at a time in memory."""
        wanted = list(clients)
        if not wanted:
            return
        with open(self._path, "rb") as file:
            for client in wanted:
                start, size = self._places[client]
                file.seek(start)
                yield client, file.read(size)

    def sync(self) -> None:
        """Wait until the open round is on the disk."""
        if self._path.is_file():
            with disk_errors(self._path), open(self._path, "r+b") as file:
                os.fsync(file.fileno())

    def settle(self, number: int, num_clients: int) -> None:
        """A round is committed: let its book go when nobody will ask for it.

        `auto` keeps what is small; a run of a single client has nothing to withdraw it from.
        """
        path = self.path(number)
        if self._keep == "always" or not path.exists():
            return
        if self._keep == "never" or num_clients < 2 or path.stat().st_size > AUTO_BYTES:
            with disk_errors(path):
                path.unlink()

    def entries(self, number: int) -> list[Entry]:
        """What every client sent in a round. Raises RunError when its book was not kept."""
        path = self.path(number)
        if not path.exists():
            raise RunError(
                f"{path}: not there: the payloads of round {number} were not kept. "
                "Federate with keep_contributions: always."
            )
        return list({entry.client: entry for entry, _ in read_entries(path)}.values())

    def path(self, number: int) -> Path:
        """The book of one round."""
        return self._folder / f"{number:05d}.bin"
