"""Dense: every number of every tensor, in one element type.

Source: plain serialization; what FedAvg sends (McMahan et al., "Communication-Efficient Learning of Deep Networks
from Decentralized Data", arXiv 1602.05629).
Wire: "DNS1" | u8 dtype (0 fp32, 1 fp16, 2 bf16) | u32 table checksum | u64 n | n numbers; little-endian, 17 + width·n
bytes. Tensors travel in name order; names and shapes are public and only their checksum is sent.
"""

from __future__ import annotations

import struct
from io import BytesIO
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from kilotune.codec import Codec, State, TensorUpdate, Update, WireContext, WireError
from kilotune.codec._frame import (
    DTYPE_CODES,
    check,
    check_finite,
    check_tensors,
    in_name_order,
    numel,
    open_header,
    table_checksum,
)
from kilotune.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

HEADER = struct.Struct("<4sBIQ")
MAGIC = b"DNS1"
WIDTH = {"fp32": 4, "fp16": 2, "bf16": 2}


def to_wire(tensor: Tensor, dtype: str) -> np.ndarray:
    """(n,) little-endian numbers, rounded half to even; bfloat16 as its 16 bits."""
    flat = tensor.detach().cpu().reshape(-1).contiguous()
    if dtype == "bf16":
        return flat.to(torch.bfloat16).view(torch.int16).numpy().astype("<i2", copy=False)
    if dtype == "fp16":
        return flat.to(torch.float16).numpy().astype("<f2", copy=False)
    return flat.to(torch.float32).numpy().astype("<f4", copy=False)


def from_wire(payload: bytes, dtype: str, count: int, offset: int) -> np.ndarray:
    """(count,) float32, a fresh array."""
    if dtype == "bf16":
        bits = np.frombuffer(payload, "<u2", count, offset).astype(np.uint32)
        return (bits << np.uint32(16)).view(np.float32)
    return np.frombuffer(payload, "<f2" if dtype == "fp16" else "<f4", count, offset).astype(np.float32)


class Dense(Codec):
    """All numbers of a TensorUpdate."""

    gives = frozenset({"values", "summable"})

    dtype: Literal["fp32", "fp16", "bf16"] = Field("fp16", description="element type on the wire; fp32 loses nothing")

    def encode(self, update: Update, context: WireContext, state: State) -> bytes:
        """Raises WireError for numbers that are not finite or leave the range of the element type."""
        if not isinstance(update, TensorUpdate):
            raise TypeError("dense takes tensors, got pairs")
        check_tensors("dense", update.tensors, context.shapes)
        shapes = in_name_order(context.shapes)
        total = sum(map(numel, shapes.values()))
        out = BytesIO()  # its getvalue() hands out the buffer without a copy
        out.write(HEADER.pack(MAGIC, DTYPE_CODES[self.dtype], table_checksum(shapes), total))
        for name in shapes:
            tensor = update.tensors[name]
            wire = to_wire(tensor, self.dtype)
            if not self._finite(wire):
                self._refuse(name, tensor)
            out.write(wire.data)
        return out.getvalue()

    def _finite(self, wire: np.ndarray) -> bool:
        if self.dtype == "bf16":  # all eight exponent bits set means NaN or infinity
            return not ((wire & np.int16(0x7F80)) == np.int16(0x7F80)).any()
        return bool(np.isfinite(wire).all())

    def _refuse(self, name: str, tensor: Tensor) -> None:
        check_finite("dense", f"tensor {name!r}", tensor.detach().cpu().float().numpy())
        raise WireError(
            f"dense: got {tensor.abs().max():.3g} in tensor {name!r}, expected numbers within {self.dtype}. "
            "Use codec.dtype: fp32."
        )

    def decode(self, payload: bytes, context: WireContext) -> TensorUpdate:
        """Fresh float32 tensors in name order."""
        shapes = in_name_order(context.shapes)
        code, table, count = open_header("dense", HEADER, MAGIC, payload)
        total = sum(map(numel, shapes.values()))
        check("dense", "dtype code", code, DTYPE_CODES[self.dtype])
        check("dense", "table checksum", table, table_checksum(shapes))
        check("dense", "element count", count, total)
        check("dense", "length", len(payload), HEADER.size + WIDTH[self.dtype] * total)
        tensors, offset = {}, HEADER.size
        for name, shape in shapes.items():
            values = from_wire(payload, self.dtype, numel(shape), offset)
            check_finite("dense", f"tensor {name!r}", values)
            tensors[name] = torch.from_numpy(values).reshape(shape)
            offset += WIDTH[self.dtype] * values.size
        return TensorUpdate(tensors)

    def predict_bytes(self, update_numel: dict[str, int], num_pairs: int) -> int:
        """Exact: 17 + width · n."""
        return HEADER.size + WIDTH[self.dtype] * sum(update_numel.values())


METHOD = Dense
