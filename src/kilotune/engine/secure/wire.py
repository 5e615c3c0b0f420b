"""Messages of the four stages, their sizes, and what every derived key is bound to.

Wire, in a round of S clients, T of them after the shares; a place is a client's position in the table, a set is a
bit per place (the first in the lowest bit of the first byte); every message starts with three letters and a digit:

    keys      up    "SAK1" | public key for shares 32 | public key for masks 32
    table     down  "SAT1" | per place: member id 8 | the two public keys
    shares    up    "SAS1" | SHA-256 of the own mask's seed | per other place: 82 sealed bytes
    mail      down  "SAM1" | set of the T senders | per other sender: the 82 bytes for this client
    vector    up    "SAV1" | words
    survivors down  "SAU1" | set of the clients in the sum
    revealed  up    "SAR1" | per sender: 33 bytes, a share of its mask's seed if it is in the sum, else of its mask key
"""

import hashlib
import struct
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from kilotune.core.errors import WireError
from kilotune.engine.secure.fixed import FRONT
from kilotune.engine.secure.masks import KEY_BYTES, TAG_BYTES
from kilotune.engine.secure.shamir import SHARE_BYTES

KEYS, TABLE, SHARES, MAIL = b"SAK1", b"SAT1", b"SAS1", b"SAM1"
VECTOR, SURVIVORS, REVEALED = b"SAV1", b"SAU1", b"SAR1"
MAGIC_BYTES, ID_BYTES = 4, 8
ENTRY_BYTES = ID_BYTES + 2 * KEY_BYTES
SEALED_BYTES = 2 * SHARE_BYTES + TAG_BYTES
LEAST_CLIENTS = 2  # the sum of one client is its update


@dataclass(frozen=True)
class Entry:
    """One client in a round's table."""

    member: bytes
    share_key: bytes
    mask_key: bytes


def threshold_of(fraction: float, clients: int) -> int:
    """Clients of so many that must stay to the end; more than half, as the recipe's fraction is."""
    return ceil(Fraction(str(fraction)) * clients)  # as a decimal: 0.6 · 5 is 3


def member_id(genesis: str, client: str) -> bytes:
    """What stands for a client's name in a run's tables."""
    return hashlib.sha256(b"kilotune-member" + bytes.fromhex(genesis) + client.encode()).digest()[:ID_BYTES]


def binding_of(number: int, head: str, attempt: str, threshold: int, table: bytes) -> bytes:
    """32 bytes that all keys of an attempt depend on: run and history (head), round, attempt, and everybody's keys."""
    facts = struct.pack("<II", number, threshold) + bytes.fromhex(head) + hashlib.sha256(attempt.encode()).digest()
    return hashlib.sha256(b"kilotune-secure-1" + facts + table).digest()


def open_message(magic: bytes, payload: bytes, size: int | None = None) -> bytes:
    """What follows the magic. Raises WireError for another message or another size."""
    if payload[:MAGIC_BYTES] != magic:
        raise WireError(f"secure aggregation: got {payload[:MAGIC_BYTES]!r}, expected a {magic.decode()} message.")
    if size is not None and len(payload) != MAGIC_BYTES + size:
        raise WireError(
            f"secure aggregation: got {len(payload)} bytes of {magic.decode()}, expected {MAGIC_BYTES + size}. "
            "The payload is cut, altered or of another recipe."
        )
    return payload[MAGIC_BYTES:]


def pack_table(entries: list[Entry]) -> bytes:
    return TABLE + b"".join(entry.member + entry.share_key + entry.mask_key for entry in entries)


def unpack_table(payload: bytes) -> list[Entry]:
    """Raises WireError when it is cut or names a client or a key twice."""
    body = open_message(TABLE, payload)
    if len(body) % ENTRY_BYTES:
        raise WireError(f"secure aggregation: got a table of {len(body)} bytes, expected a multiple of {ENTRY_BYTES}.")
    entries = []
    for start in range(0, len(body), ENTRY_BYTES):
        raw = body[start : start + ENTRY_BYTES]
        entries.append(Entry(raw[:ID_BYTES], raw[ID_BYTES : ID_BYTES + KEY_BYTES], raw[ID_BYTES + KEY_BYTES :]))
    keys = [key for entry in entries for key in (entry.share_key, entry.mask_key)]
    if len({entry.member for entry in entries}) < len(entries) or len(set(keys)) < len(keys):
        raise WireError("secure aggregation: got a table that names a client or a key twice.")
    return entries


def set_bytes(clients: int) -> int:
    return -(-clients // 8)


def pack_set(places: set[int], clients: int) -> bytes:
    return sum(1 << place for place in places).to_bytes(set_bytes(clients), "little")


def unpack_set(raw: bytes, clients: int) -> set[int]:
    """Raises WireError when a place is not in the table."""
    bits = int.from_bytes(raw, "little")
    if bits >> clients:
        raise WireError(f"secure aggregation: got a set with places beyond the {clients} of the table.")
    return {place for place in range(clients) if bits >> place & 1}


def up_bytes(clients: int, numbers: int, bits: int) -> int:
    """Exact, per client of a round in which nobody drops out."""
    keys, shares = 2 * KEY_BYTES, KEY_BYTES + (clients - 1) * SEALED_BYTES
    return 4 * MAGIC_BYTES + keys + shares + (FRONT + numbers) * bits // 8 + clients * SHARE_BYTES


def down_bytes(clients: int) -> int:
    """Exact, per client of a round in which nobody drops out; the rounds of the ledger come on top."""
    table, mail = clients * ENTRY_BYTES, set_bytes(clients) + (clients - 1) * SEALED_BYTES
    return 3 * MAGIC_BYTES + table + mail + set_bytes(clients)
