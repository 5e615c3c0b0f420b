"""Golomb–Rice: rising indices below n as gaps, each gap g as its b low bits and g >> b in unary; b fits the gaps best.

Source: Golomb, "Run-Length Encodings", 1966; Rice, "Some Practical Universal Noiseless Coding Techniques", 1979.
Wire: of k gaps (numbers skipped since the last index) first k times b bits, high bit first, then for each g >> b zeros
and a one; the first bit is the highest of its byte, the last byte is filled with zeros. With b = 0 that is a bitmap.
"""

import numpy as np

from kilotune.core.errors import WireError

WIDEST = 40  # low bits of a gap at most: more than any tensor has numbers


def most_bytes(n: int, k: int) -> int:
    """Bytes for k or fewer indices below n at most, whichever they are."""
    return min(_bytes(n, k, b) for b in range(max(n, 1).bit_length() + 1)) if k else 0


def _bytes(n: int, k: int, b: int) -> int:
    return (k * (b + 1) + ((n - k) >> b) + 7) // 8


def encode(indices: np.ndarray) -> tuple[int, bytes]:
    """(b, bits) of (k,) rising int64 indices; the smallest b that gives the fewest bits."""
    if not indices.size:
        return 0, b""
    gaps = np.diff(indices, prepend=-1) - 1
    b, length = 0, indices.size + int(gaps.sum())
    while True:  # bits fall until the best b and rise after it
        longer = indices.size * (b + 2) + int((gaps >> (b + 1)).sum())
        if longer >= length:
            break
        b, length = b + 1, longer
    bits = np.zeros(length, np.uint8)
    low = bits[: indices.size * b].reshape(indices.size, b)
    for place in range(b):
        low[:, place] = (gaps >> (b - 1 - place)) & 1
    bits[indices.size * b + np.cumsum((gaps >> b) + 1) - 1] = 1
    return b, np.packbits(bits).tobytes()


def decode(codec: str, raw: bytes, b: int, k: int, n: int) -> np.ndarray:
    """(k,) rising int64 indices below n. Raises WireError for anything that `encode` does not write."""
    if b > WIDEST or len(raw) > (_bytes(n, k, b) if k else 0) or k * (b + 1) > 8 * len(raw):
        raise WireError(f"{codec}: got {len(raw)} bytes of indices, expected {k} below {n}. The payload is altered.")
    bits = np.unpackbits(np.frombuffer(raw, np.uint8))
    ends = np.flatnonzero(bits[k * b :])
    if ends.size != k or (k and (k * b + int(ends[-1])) // 8 + 1 != len(raw)):
        raise WireError(f"{codec}: got {ends.size} indices, expected {k}. The payload is altered.")
    gaps = (np.diff(ends, prepend=-1) - 1) << b
    low = bits[: k * b].reshape(k, b)
    for place in range(b):
        gaps |= low[:, place].astype(np.int64) << (b - 1 - place)
    indices = np.cumsum(np.minimum(gaps, n) + 1) - 1
    if k and int(indices[-1]) >= n:
        raise WireError(f"{codec}: got index {indices[-1]}, expected indices below {n}. The payload is altered.")
    return indices
