"""Random streams: every random number of a run comes from `stream(seed, *path)`; nothing touches global state."""

import hashlib
import struct

import numpy as np


def derive(seed: int, *path: str | int) -> int:
    """A 64-bit integer that depends on the seed and the whole path and nothing else.

    SHA-256 over length-prefixed parts, so ("ab", "c") and ("a", "bc") differ; the first 8 bytes, little-endian.
    `seed` and integer parts lie in [0, 2^64).
    """
    digest = hashlib.sha256(struct.pack("<Q", seed))
    for part in path:
        raw = part.encode() if isinstance(part, str) else struct.pack("<Q", part)
        digest.update(b"s" if isinstance(part, str) else b"i")
        digest.update(struct.pack("<I", len(raw)))
        digest.update(raw)
    return int.from_bytes(digest.digest()[:8], "little")


def stream(seed: int, *path: str | int) -> np.random.Generator:
    """An independent generator for one purpose, e.g. stream(seed, "batches", client, round)."""
    return np.random.Generator(np.random.Philox(key=derive(seed, *path)))
