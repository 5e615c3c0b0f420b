"""Seed file: a whole fine-tune as one small file, `base + file = tuned model`, bit for bit.

Wire, little-endian: b"KTS1" | n uint32 | n bytes of JSON (header and records of the ledger) | for every round
    uint32 length and that many bytes of payload | 32 bytes SHA-256 of all before.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from kilotune.core.errors import WireError
from kilotune.engine.files import write_bytes
from kilotune.engine.rounds.ledger import Contribution, Header, Ledger, canonical

MAGIC = b"KTS1"


def pack(ledger: Ledger) -> bytes:
    """The ledger as one file's bytes."""
    facts = canonical({"header": asdict(ledger.header), "records": [r.to_json() for r in ledger.records]})
    parts = [MAGIC, len(facts).to_bytes(4, "little"), facts]
    for record in ledger.records:
        payload = ledger.payload(record.round)
        parts += [len(payload).to_bytes(4, "little"), payload]
    body = b"".join(parts)
    return body + hashlib.sha256(body).digest()


def unpack(raw: bytes, name: str) -> Ledger:
    """The verified ledger in a seed file. Raises WireError for a cut, altered or foreign file."""
    if raw[:4] != MAGIC:
        raise WireError(f"{name}: starts with {raw[:4]!r}, expected {MAGIC!r}: this is no seed file.")
    body, checksum = raw[:-32], raw[-32:]
    if hashlib.sha256(body).digest() != checksum:
        raise WireError(f"{name}: cut or altered: its checksum does not fit its {len(raw)} bytes. Copy it again.")
    try:
        size = int.from_bytes(body[4:8], "little")
        facts = json.loads(body[8 : 8 + size])
        ledger = Ledger(Header(**facts["header"]))
        rest = body[8 + size :]
        for content in facts["records"]:
            contributions = tuple(Contribution(**c) for c in content["contributions"])
            length = int.from_bytes(rest[:4], "little")
            payload, rest = rest[4 : 4 + length], rest[4 + length :]
            record = ledger.append(content["root"], payload, contributions)
            if record.hash != content["hash"]:
                raise WireError(f"{name}: round {record.round} breaks the hash chain; the file was altered.")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise WireError(f"{name}: not readable as a seed file: {error}.") from None
    return ledger


def is_seed_file(path: Path) -> bool:
    """Whether a path is meant as a seed file: by its name, or by its first bytes."""
    if path.suffix == ".seed" and not path.is_dir():
        return True
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def write(ledger: Ledger, path: Path) -> int:
    """Write the file; returns its size in bytes."""
    raw = pack(ledger)
    write_bytes(path, raw)
    return len(raw)


def read(path: Path) -> Ledger:
    if not path.is_file():
        raise WireError(f"{path}: no such seed file.")
    return unpack(path.read_bytes(), str(path))
