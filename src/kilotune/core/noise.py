"""Noise spec v1: noise(root, index, tensor name, element) is a pure function, the same bits on every machine.

key      = first 16 bytes of SHA-256(domain, law, root, index, name)      -> two 64-bit words
word(j)  = mixer of key and counter j, integer arithmetic only
element  = a bit of a word (sign) or one word (gaussian, uniform), through exact integer steps or float64 + - * / sqrt

Order of tensors, frozen tensors, dtype, thread count, process and library version do not matter.
docs/wire.md gives every bit and test vectors.
"""

import hashlib
import struct
from collections.abc import Mapping, Sequence

import numpy as np

from kilotune.core._spec import LAWS

__all__ = ["LAWS", "NOISE_SPEC", "digest", "noise", "stream_key", "tensor_digest"]

NOISE_SPEC = 1

_DOMAIN = b"kilotune-noise-1"
_DIGEST_BLOCK = 1 << 20


def stream_key(law: str, root: int, index: int, name: str) -> tuple[int, int]:
    """The two 64-bit words (k0, k1) that key the stream of one direction in one tensor."""
    if law not in LAWS:
        raise ValueError(f"noise.law: got {law!r}, expected one of {', '.join(LAWS)}.")
    for field, value in (("root", root), ("index", index)):
        if not 0 <= value < 1 << 64:
            raise ValueError(f"noise.{field}: got {value}, expected 0 <= {field} < 2^64.")
    hasher = hashlib.sha256()
    for text in (_DOMAIN, law.encode()):
        hasher.update(struct.pack("<I", len(text)) + text)
    raw = name.encode()
    hasher.update(struct.pack("<QQI", root, index, len(raw)) + raw)
    k0, k1 = struct.unpack("<QQ", hasher.digest()[:16])
    return k0, k1


def noise(law: str, root: int, index: int, name: str, start: int, count: int) -> np.ndarray:
    """(count,) float32: elements start .. start+count-1 of a tensor's noise, flat in row-major order.

    sign: +1 or -1. gaussian: standard normal. uniform: in (-1, 1), variance 1/3.
    """
    if start < 0 or count < 0:
        raise ValueError(f"noise: got start {start} and count {count}, expected both >= 0.")
    from kilotune.core import kernels  # loads numba: only when noise is really made

    return kernels.fill(law, stream_key(law, root, index, name), start, count)


def tensor_digest(law: str, roots: Sequence[int], name: str, size: int) -> str:
    """SHA-256 over one tensor's noise (direction 0) under every root, little-endian float32."""
    hasher = hashlib.sha256()
    for root in roots:
        for start in range(0, size, _DIGEST_BLOCK):
            block = noise(law, root, 0, name, start, min(_DIGEST_BLOCK, size - start))
            hasher.update(block.astype("<f4", copy=False).tobytes())
    return hasher.hexdigest()


def digest(law: str, roots: Sequence[int], sizes: Mapping[str, int]) -> str:
    """SHA-256 over the sorted lines "name size tensor_digest": two machines that agree here hold the same noise."""
    lines = [f"{name} {size} {tensor_digest(law, roots, name, size)}\n" for name, size in sorted(sizes.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
