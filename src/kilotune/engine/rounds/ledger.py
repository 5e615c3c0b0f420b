"""Ledger: the global state as a list of rounds, append-only and chained by hash. Replay is the only way to a model.

A run folder holds `ledger.jsonl` (a header, then one record per round) and `payloads/00001.bin` ... (what every
receiver decodes and applies). A record's hash covers the previous hash, the round, its root, the payload and who
took part, so no round can be changed, dropped, re-ordered or borrowed from another run unseen.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from kilotune.core.errors import RunError, WireError
from kilotune.engine.files import append_line, write_bytes

FORMAT = 1
LEDGER = "ledger.jsonl"
MEMBERS_BYTES = 32
CACHE_BYTES = 64 << 20  # of rounds kept in memory beside the last one; the others are read from disk when asked for


@dataclass(frozen=True)
class Header:
    """What the rounds build on. Two runs with equal headers and payloads hold equal weights."""

    base: str
    base_digest: str
    recipe_id: str
    noise_spec: int
    recipe: dict[str, Any]
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise WireError(
                f"ledger: got format {self.format!r}, expected {FORMAT}: it was written by another version of kilotune."
            )
        if not isinstance(self.recipe, dict):
            raise TypeError("its recipe is no mapping")

    @property
    def hash(self) -> str:
        """Start of the chain. The base's name and the private keys of the recipe are not part of it."""
        content = {"base": self.base_digest, "recipe": self.recipe_id, "noise": self.noise_spec, "format": self.format}
        return hashlib.sha256(b"kilotune-ledger" + canonical(content)).hexdigest()


@dataclass(frozen=True, slots=True)
class Contribution:
    """One client's part in a round: weight · scale · its update, with the coefficients of pairs cut to `limit`."""

    client: str
    num_examples: int
    weight: float
    payload_sha256: str
    scale: float = 1.0
    limit: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Without what changes nothing, so that a round in which nothing was cut has the hash it always had."""
        content = asdict(self)
        return {k: v for k, v in content.items() if (k, v) not in (("scale", 1.0), ("limit", None))}


@dataclass(frozen=True)
class Record:
    """One round."""

    round: int
    root: int
    payload_sha256: str
    contributions: tuple[Contribution, ...]
    previous: str
    hash: str

    @cached_property
    def members(self) -> bytes:
        """32 bytes that stand for who took part, with what and with which weight."""
        return hashlib.sha256(canonical([c.to_json() for c in self.contributions])).digest()

    def to_json(self) -> dict[str, Any]:
        """A line of the ledger."""
        return {**asdict(self), "contributions": [c.to_json() for c in self.contributions]}


def canonical(content: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal content, equal bytes."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def link(previous: str, round: int, root: int, members: bytes, payload: bytes) -> str:
    """The hash of a round: what a client recomputes from what it received."""
    return chained(previous, round, root, members, hashlib.sha256(payload).digest())


def chained(previous: str, round: int, root: int, members: bytes, payload_sha256: bytes) -> str:
    """`link` for who holds only the digest of the payload."""
    parts = bytes.fromhex(previous) + round.to_bytes(4, "little") + root.to_bytes(8, "little") + members
    return hashlib.sha256(parts + payload_sha256).hexdigest()


class Ledger:
    """The rounds of one run, in memory or, with a folder, on disk. `append` is atomic: a cut line is no round."""

    def __init__(self, header: Header, folder: Path | None = None) -> None:
        self.header = header
        self.folder = folder
        self.records: list[Record] = []
        self._parts: dict[int, bytes] = {}  # by round; with a folder only the last ones that were in use

    @property
    def head(self) -> str:
        return self.head_at(len(self.records))

    def head_at(self, round: int) -> str:
        """The head after so many rounds."""
        return self.records[round - 1].hash if round else self.header.hash

    def __len__(self) -> int:
        return len(self.records)

    @classmethod
    def open(cls, folder: Path, header: Header) -> "Ledger":
        """Continue the folder's ledger, or start it. Raises RunError when it belongs to something else."""
        if not (folder / LEDGER).exists():
            ledger = cls(header, folder)
            write_bytes(folder / LEDGER, canonical(asdict(header)) + b"\n")
            return ledger
        ledger = cls.load(folder)
        if ledger.header.base_digest != header.base_digest:
            raise RunError(
                f"{folder}: this run stands on base {ledger.header.base_digest[:16]}, got {header.base_digest[:16]} "
                f"({header.base}). Use the same base, or another --output."
            )
        if ledger.header.recipe_id != header.recipe_id:
            raise RunError(
                f"{folder}: this run follows recipe {ledger.header.recipe_id}, got {header.recipe_id}. "
                "Use the same recipe and settings to resume, or another --output."
            )
        return ledger

    @classmethod
    def load(cls, folder: Path) -> "Ledger":
        """Read and verify. An unfinished last line is left out (the next append removes it; another process may be
        at work here, so nothing is written); anything else that does not fit raises WireError."""
        path = folder / LEDGER
        if not path.exists():
            raise RunError(f"{folder}: no {LEDGER} there, so it is no run folder.")
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        lines = whole.splitlines()
        number = 1
        try:
            ledger = cls(Header(**json.loads(lines[0])), folder)
            for number, line in enumerate(lines[1:], 2):  # noqa: B007 (told when a line does not fit)
                content = json.loads(line)
                content["contributions"] = tuple(Contribution(**c) for c in content["contributions"])
                record = Record(**content)
                payload = ledger._payload_path(record.round).read_bytes()
                ledger._check(record, payload)
                ledger.records.append(record)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise WireError(f"{path}:{number}: cut or foreign: {error}.") from None
        except FileNotFoundError as error:
            raise WireError(f"{error.filename}: missing, so the run cannot be replayed.") from None
        return ledger

    def append(self, root: int, payload: bytes, contributions: tuple[Contribution, ...]) -> Record:
        """Add the next round: payload first, then the line that makes it count."""
        number = len(self.records) + 1
        draft = Record(number, root, hashlib.sha256(payload).hexdigest(), contributions, self.head, "")
        record = replace(draft, hash=link(self.head, number, root, draft.members, payload))
        if self.folder is not None:
            write_bytes(self._payload_path(number), payload)
            append_line(self.folder / LEDGER, canonical(record.to_json()))
        self.records.append(record)
        self._keep(number, record.members + payload)
        return record

    def part(self, round: int) -> bytes:
        """What a client is sent of a round (rounds count from 1): 32 bytes for the members, then the payload."""
        part = self._parts.pop(round, None)
        if part is None:
            path = self._payload_path(round)
            try:
                part = self.records[round - 1].members + path.read_bytes()
            except FileNotFoundError:
                raise WireError(f"{path}: missing, so the run cannot go on. Put it back.") from None
        self._keep(round, part)
        return part

    def holds(self, round: int, part: bytes) -> bool:
        """Whether these very bytes came from `part`, so that nobody has to look at them again."""
        return self._parts.get(round) is part

    def payload(self, round: int) -> bytes:
        """What was broadcast for a round."""
        return self.part(round)[MEMBERS_BYTES:]

    def since(self, round: int) -> Iterator[tuple[Record, bytes]]:
        """Records and payloads of the rounds after this one."""
        for record in self.records[round:]:
            yield record, self.payload(record.round)

    def _keep(self, round: int, part: bytes) -> None:
        """At the end of what is kept; what was not asked for longest makes room if it can be read again."""
        self._parts[round] = part
        if self.folder is None:
            return
        total = sum(map(len, self._parts.values()))
        while total > CACHE_BYTES and len(self._parts) > 1:
            total -= len(self._parts.pop(next(iter(self._parts))))

    def _payload_path(self, round: int) -> Path:
        if self.folder is None:
            raise RunError("this ledger has no folder.")
        return self.folder / "payloads" / f"{round:05d}.bin"

    def _check(self, record: Record, payload: bytes) -> None:
        wanted = link(self.head, len(self.records) + 1, record.root, record.members, payload)
        whole = record.payload_sha256 == hashlib.sha256(payload).hexdigest()
        if record.previous != self.head or record.hash != wanted or record.round != len(self.records) + 1 or not whole:
            raise WireError(
                f"ledger: round {record.round} does not follow from round {len(self.records)}: the chain is broken "
                f"(hash {record.hash[:16]}, expected {wanted[:16]}). The run was altered or belongs to another base."
            )
