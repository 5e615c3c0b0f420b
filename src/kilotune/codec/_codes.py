"""Codes of a few bits, and the payload of tensors in which every number is a code and every block has float32 facts."""

from __future__ import annotations

import struct
from functools import cache

import numpy as np

from kilotune.codec._frame import Shapes, check, in_name_order, numels, open_header, table_checksum
from kilotune.core.errors import WireError

HEADER = struct.Struct("<4sBBIIQ")
CHUNK = 1 << 20  # codes packed at once; a multiple of 8, so that chunks end with whole bytes


def pack(codes: np.ndarray, bits: int) -> bytes:
    """(n,) uint8 codes below 2^bits one after the other, high bit first; the last byte is filled with zeros."""
    parts = []
    for start in range(0, codes.size, CHUNK):
        wide = np.unpackbits(codes[start : start + CHUNK, None], axis=1)[:, 8 - bits :]
        parts.append(np.packbits(wide).tobytes())
    return b"".join(parts)


def unpack(codec: str, raw: bytes, bits: int, count: int) -> np.ndarray:
    """(count,) uint8 codes. Raises WireError when the bytes do not hold just these."""
    check(codec, "bytes of codes", len(raw), num_bytes(count, bits))
    out = np.empty(count, np.uint8)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        some = np.frombuffer(raw, np.uint8, num_bytes(size, bits), start // 8 * bits)
        if 8 % bits == 0:
            codes = _codes_of_bytes(bits)[some].view(np.uint8)
            codes, behind = codes[:size], codes[size:]
        else:
            found = np.unpackbits(some)
            wide, behind = np.zeros((size, 8), np.uint8), found[size * bits :]
            wide[:, 8 - bits :] = found[: size * bits].reshape(size, bits)
            codes = np.packbits(wide, axis=1)[:, 0]
        if behind.any():
            raise WireError(f"{codec}: got bits behind the last code, expected zeros. The payload is altered.")
        out[start : start + size] = codes
    return out


@cache
def _codes_of_bytes(bits: int) -> np.ndarray:
    """(256,) of 8 / bits bytes each: the codes in a byte, so that unpacking is one look-up a byte."""
    shifts = np.arange(8 - bits, -1, -bits, dtype=np.uint8)
    codes = (np.arange(256, dtype=np.uint8)[:, None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.view(f"u{shifts.size}")[:, 0]


def rounded(levels: np.ndarray, values: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    """(n,) places in rising `levels` (two or more) for values between the first and the last: the nearest, the lower
    one at a tie; with `rng` one of both neighbours so that the mean is the value."""
    low = np.minimum(np.searchsorted(levels, values, side="right"), levels.size - 1) - 1
    share = (values - levels[low]) / (levels[low + 1] - levels[low])
    return np.asarray(low + (share > (0.5 if rng is None else rng.random(values.shape))))


def num_bytes(count: int, bits: int) -> int:
    """Bytes of so many codes."""
    return (count * bits + 7) // 8


def num_blocks(size: int, block: int) -> int:
    """Blocks of a tensor; block 0: the tensor is one."""
    return -(-size // block) if block else min(size, 1)


class Frame:
    """Wire: magic | u8 bits | u8 kind | u32 block | u32 table checksum | u64 n | fp32 facts, all of a block together |
    n codes; little-endian. Blocks restart at each tensor, block 0 is the whole tensor; tensors travel in name order."""

    def __init__(self, codec: str, magic: bytes, bits: int, kind: int, block: int, facts: int = 1) -> None:
        """`facts`: numbers that each block has of its own."""
        self._codec, self._magic, self._facts = codec, magic, facts
        self._same = {"bits": bits, "kind": kind, "block": block}

    def write(self, shapes: Shapes, facts: list[np.ndarray], codes: list[np.ndarray]) -> bytes:
        """Facts (blocks, facts) and codes (n,) of each tensor by name."""
        table, joined = table_checksum(in_name_order(shapes)), np.concatenate([np.zeros(0, np.uint8), *codes])
        header = HEADER.pack(self._magic, *self._same.values(), table, joined.size)
        return b"".join([header, *(part.astype("<f4").tobytes() for part in facts), pack(joined, self._same["bits"])])

    def read(self, shapes: Shapes, payload: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Facts (blocks, facts) and codes (n,) of all tensors."""
        *same, table, count = open_header(self._codec, HEADER, self._magic, payload)
        for what, got in zip(self._same, same, strict=True):
            check(self._codec, what, got, self._same[what])
        sizes = numels(shapes)
        check(self._codec, "table checksum", table, table_checksum(in_name_order(shapes)))
        check(self._codec, "number count", count, sum(sizes))
        blocks = sum(num_blocks(size, self._same["block"]) for size in sizes)
        middle = HEADER.size + 4 * self._facts * blocks
        check(self._codec, "length", len(payload), middle + num_bytes(count, self._same["bits"]))
        facts = np.frombuffer(payload, "<f4", self._facts * blocks, HEADER.size).astype(np.float32)
        if not np.isfinite(facts).all():
            raise WireError(f"{self._codec}: got a scale that is not finite. The payload is altered.")
        codes = unpack(self._codec, payload[middle:], self._same["bits"], count)
        return facts.reshape(blocks, self._facts), codes

    def size(self, numel: dict[str, int]) -> int:
        """Bytes of a payload."""
        blocks = sum(num_blocks(size, self._same["block"]) for size in numel.values())
        return HEADER.size + 4 * self._facts * blocks + num_bytes(sum(numel.values()), self._same["bits"])


def spread(per_block: np.ndarray, shapes: Shapes, block: int) -> np.ndarray:
    """(n,) what each number's block has, tensors by name."""
    counts = []
    for size in numels(shapes):
        width = block or max(size, 1)
        counts.append(np.minimum(width, size - np.arange(0, size, width)))
    return np.repeat(per_block, np.concatenate([np.zeros(0, np.int64), *counts]))
