"""What sparse payloads share: which numbers travel, and the header with their places."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import numpy as np

from kilotune.codec import _golomb as golomb
from kilotune.codec._frame import Shapes, check, in_name_order, numels, open_header, table_checksum
from kilotune.codec._vector import largest
from kilotune.core.errors import WireError

HEADER = struct.Struct("<4sIIBI")


def num_kept(density: float, size: int) -> int:
    """How many of `size` numbers travel: density · size rounded half to even, at least one."""
    return min(size, max(1, round(density * size)))


def most_kept(density: float, scope: str, sizes: Iterable[int]) -> int:
    """Numbers that travel at most: of all tensors together, or of each (`scope: tensor`)."""
    sizes = list(sizes)
    return num_kept(density, sum(sizes)) if scope == "all" else sum(num_kept(density, size) for size in sizes)


def chosen(values: np.ndarray, density: float, scope: str, sizes: list[int]) -> np.ndarray:
    """Rising places in (n,) values of the largest magnitudes, zeros left out."""
    magnitudes, places, start = np.abs(values), [], 0
    for size in [values.size] if scope == "all" else sizes:
        part = magnitudes[start : start + size]
        found = largest(part, num_kept(density, size))
        places.append(start + found[part[found] > 0])
        start += size
    return np.concatenate(places) if places else np.zeros(0, np.int64)


def write(magic: bytes, shapes: Shapes, places: np.ndarray) -> bytes:
    """Header and places."""
    b, raw = golomb.encode(places)
    return HEADER.pack(magic, table_checksum(in_name_order(shapes)), places.size, b, len(raw)) + raw


def read(codec: str, magic: bytes, shapes: Shapes, most: int, payload: bytes) -> tuple[np.ndarray, int]:
    """Places, and where they end. Raises WireError for a payload that is not of this codec and table."""
    table, count, b, length = open_header(codec, HEADER, magic, payload)
    check(codec, "table checksum", table, table_checksum(in_name_order(shapes)))
    end = HEADER.size + length
    if count > most or len(payload) < end:
        raise WireError(
            f"{codec}: got {count} numbers in {len(payload)} bytes, expected at most {most} and {end} bytes or more. "
            "The payload is cut, altered or from another recipe."
        )
    total = sum(numels(shapes))
    return golomb.decode(codec, payload[HEADER.size : end], b, count, total), end


def most_bytes(total: int, count: int) -> int:
    """Bytes of header and places at most, of `count` numbers or fewer."""
    return HEADER.size + golomb.most_bytes(total, count)
