"""What all payloads share: a header of fixed size, a checksum of the tensor table, and checks before any allocation."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from kilotune.core.errors import WireError

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
TOP = 1e38  # beyond this a decoded float32 number could overflow

DTYPE_CODES = {"fp32": 0, "fp16": 1, "bf16": 2, "int8": 3, "int16": 4, "int4": 5}
"""Numbers of the element types in headers, one table for all codecs."""


def table_checksum(shapes: Shapes) -> int:
    """CRC-32 of the (name, shape) table in the given order.

    Per tensor: u32 byte length of the UTF-8 name, the name, u32 number of axes, one u64 per axis; little-endian.
    """
    crc = 0
    for name, shape in shapes.items():
        raw = name.encode()
        crc = zlib.crc32(struct.pack("<I", len(raw)) + raw + struct.pack(f"<I{len(shape)}Q", len(shape), *shape), crc)
    return crc


def in_name_order(shapes: Shapes) -> Shapes:
    """The same table in the order in which tensors travel."""
    return {name: tuple(shapes[name]) for name in sorted(shapes)}


def numel(shape: tuple[int, ...]) -> int:
    """Number of elements, as an unbounded integer."""
    product = 1
    for side in shape:
        product *= int(side)
    return product


def numels(shapes: Shapes) -> list[int]:
    """Number of elements of each tensor, in the order in which tensors travel."""
    return [numel(shape) for shape in in_name_order(shapes).values()]


def open_header(codec: str, header: struct.Struct, magic: bytes, payload: bytes) -> tuple[Any, ...]:
    """The header's fields without the magic. Raises WireError when the payload is not of this codec."""
    if len(payload) < header.size:
        raise WireError(f"{codec}: got {len(payload)} bytes, expected a header of {header.size}. The payload is cut.")
    found = bytes(payload[: len(magic)])
    if found != magic:
        raise WireError(f"{codec}: got magic {found!r}, expected {magic!r}. It is of another codec or version.")
    return header.unpack_from(payload)[1:]


def check(codec: str, what: str, got: Any, expected: Any) -> None:
    """Refuse a header field that differs from what the receiver knows."""
    if got != expected:
        raise WireError(
            f"{codec}: got {what} {got}, expected {expected}. The payload is cut, altered or from another recipe."
        )


def check_finite(codec: str, what: str, values: np.ndarray) -> None:
    """Refuse NaN and infinity."""
    if not np.isfinite(values).all():
        raise WireError(f"{codec}: got NaN or infinity in {what}, expected finite numbers. The sender diverged.")


def check_range(codec: str, name: str, values: np.ndarray) -> None:
    """Refuse to send numbers that are not finite, or so large that a scale times an integer could overflow."""
    check_finite(codec, f"tensor {name!r}", values)
    peak = max(float(values.max()), -float(values.min())) if values.size else 0.0
    if peak > TOP:
        raise WireError(
            f"{codec}: got {peak:.3g} in tensor {name!r}, expected at most {TOP}. The client diverged; "
            "lower optimizer.lr."
        )


def check_indices(codec: str, indices: np.ndarray, size: int) -> None:
    """Refuse directions that the basis does not have (size 0 = unknown, then 32 bits must do)."""
    limit = size or 2**32
    bad = indices[(indices < 0) | (indices >= limit)]
    if bad.size:
        raise WireError(f"{codec}: got direction {bad[0]}, expected 0 <= index < {limit}. Use one basis.size.")


def check_tensors(codec: str, tensors: dict[str, Tensor], shapes: Shapes) -> None:
    """Our own invariant on the sending side: the update holds exactly the trainable tensors."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if in_name_order(found) != in_name_order(shapes):
        odd = sorted(set(found.items()) ^ {(name, tuple(shape)) for name, shape in shapes.items()})
        raise ValueError(f"{codec}: the update and the context disagree on {odd[:4]}, expected equal names and shapes.")
