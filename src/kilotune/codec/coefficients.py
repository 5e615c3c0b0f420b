"""Coefficients: few numbers in blocks of 64, each block with its own step: q = round(x / step), decoded = q · step.

Source: ours; absmax block scales as in Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv
2110.02861; error feedback as in Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression
Schemes", arXiv 1901.09847.
Departs: a block's step is fp16 rounded up, times 2^e shared by the payload, so that no number leaves the integer
range and neither tiny nor huge updates underflow or overflow.
Wire: "COF1" | u8 dtype (1 fp16, 3 int8, 4 int16, 5 int4) | u16 block | i16 e | u32 table checksum | u32 number of
blocks | u64 n | fp16 step of each block | n numbers (int4: two per byte, the first one high); little-endian,
25 + 2·blocks + ⌈bits·n/8⌉ bytes. Blocks restart at each tensor; tensors travel in name order.
"""

from __future__ import annotations

import math
import struct
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from kilotune.codec import Codec, State, TensorUpdate, Update, WireContext, WireError
from kilotune.codec._blocks import block_peaks, layout, round_up_fp16, signed
from kilotune.codec._codes import num_bytes, pack, unpack
from kilotune.codec._frame import (
    DTYPE_CODES,
    check,
    check_range,
    check_tensors,
    in_name_order,
    numel,
    open_header,
    table_checksum,
)
from kilotune.codec._loops import compiled
from kilotune.core.lazy import torch

HEADER = struct.Struct("<4sBHhIIQ")
MAGIC = b"COF1"


class Number(NamedTuple):
    """One type of numbers on the wire: the largest |q|, its bits, and what holds it before it is packed."""

    limit: int
    bits: int
    whole: str


NUMBERS = {
    "int4": Number(7, 4, "<i1"),
    "int8": Number(127, 8, "<i1"),
    "int16": Number(32767, 16, "<i2"),
    "fp16": Number(32768, 16, "<f2"),
}


class Coefficients(Codec):
    """Quantized tensors of few numbers, normally one tensor of coordinates (M,)."""

    gives = frozenset({"summable"})

    dtype: Literal["int4", "int8", "int16", "fp16"] = Field("int8", description="type of a number inside its block")
    block: int = Field(64, ge=1, le=65535, description="numbers that share a 2-byte step")
    error_feedback: bool = Field(True, description="add what rounding lost to the next update under the same root")

    @property
    def _number(self) -> Number:
        return NUMBERS[self.dtype]

    @property
    def remembers(self) -> bool:
        """With error feedback."""
        return self.error_feedback

    def encode(self, update: Update, context: WireContext, state: State) -> bytes:
        """State: `residual/<name>` float32 and `residual_root` () int64, both only with error feedback."""
        if not isinstance(update, TensorUpdate):
            raise TypeError("coefficients takes tensors, got pairs")
        check_tensors("coefficients", update.tensors, context.shapes)
        shapes = in_name_order(context.shapes)
        values = self._values(update, context, state)
        peaks = {name: block_peaks(value, self.block) for name, value in values.items()}
        top = max((float(peak.max()) for peak in peaks.values() if peak.size), default=0.0) / self._number.limit
        exponent = math.frexp(top)[1] - 15 if top else 0  # steps / 2^e fill fp16 up to 32768
        scales, numbers = [], []
        for name, value in values.items():
            scale = round_up_fp16(np.ldexp(peaks[name] / self._number.limit, -exponent))
            number = self._quantize(value, scale, exponent)
            scales.append(scale.astype("<f2"))
            numbers.append(number)
            if self.error_feedback:
                sent = self._dequantize(number, scale, exponent)
                assert sent is not None, "coefficients: encoded numbers out of range"
                state[f"residual/{name}"] = torch.from_numpy((value - sent).astype(np.float32)).reshape(shapes[name])
        if self.error_feedback:
            state["residual_root"] = torch.tensor(signed(context.root), dtype=torch.int64)
        head = (self.block, exponent, table_checksum(shapes), sum(s.size for s in scales), sum(q.size for q in numbers))
        header = HEADER.pack(MAGIC, DTYPE_CODES[self.dtype], *head)
        return b"".join([header, *(part.tobytes() for part in scales), *self._packed(numbers)])

    def _values(self, update: TensorUpdate, context: WireContext, state: State) -> dict[str, np.ndarray]:
        """(n,) float64 of each tensor in name order: the update plus what earlier rounds lost."""
        kept, values = self.carried(state, context.root), {}
        for name in sorted(context.shapes):
            value = update.tensors[name].detach().cpu().reshape(-1).double().numpy()
            check_range("coefficients", name, value)
            last = kept.get(f"residual/{name}")
            values[name] = value if last is None else value + last.reshape(-1).double().numpy()
        return values

    def carried(self, state: State, root: int) -> State:
        """Residuals, if the root is still theirs: under another one the same numbers are another direction."""
        last = state.get("residual_root")
        return state if self.error_feedback and last is not None and int(last) == signed(root) else {}

    def _quantize(self, value: np.ndarray, scale: np.ndarray, exponent: int) -> np.ndarray:
        step = np.repeat(np.ldexp(scale.astype(np.float64), exponent), self.block)[: value.size]
        ratio = np.divide(value, step, out=np.zeros_like(value), where=step > 0)
        return (ratio if self.dtype == "fp16" else np.rint(ratio)).astype(self._number.whole)

    def _packed(self, numbers: list[np.ndarray]) -> list[bytes]:
        if self.dtype != "int4":
            return [part.tobytes() for part in numbers]
        return [pack(np.concatenate([np.zeros(0, np.int8), *numbers]).view(np.uint8) & 0xF, 4)]

    def _unpacked(self, raw: bytes, count: int) -> np.ndarray:
        if self.dtype != "int4":
            return np.frombuffer(raw, self._number.whole, count)
        return (unpack("coefficients", raw, 4, count) ^ 8).view(np.int8) - np.int8(8)  # two's complement

    def _dequantize(self, number: np.ndarray, scale: np.ndarray, exponent: int) -> np.ndarray | None:
        """(n,) float32. The product is exact in float64 and rounded once, so every machine gets the same bits. None
        when a step or a number is beyond its range or a product is not finite: the payload is hostile."""
        values = np.empty(number.size, np.float32)
        steps = scale.astype(np.float64) * 2.0 ** min(max(exponent, -1000), 1000)  # far beyond float32 at both ends
        if self.dtype == "fp16":  # which the compiler does not know
            number = number.astype(np.float32)
        return values if compiled()(number, steps, self.block, self._number.limit, values) else None

    def decode(self, payload: bytes, context: WireContext) -> TensorUpdate:
        """Fresh float32 tensors in name order."""
        shapes, blocks, total, checksum = layout(tuple(context.shapes.items()), self.block)
        code, block, exponent, table, num_blocks, count = open_header("coefficients", HEADER, MAGIC, payload)
        check("coefficients", "dtype code", code, DTYPE_CODES[self.dtype])
        check("coefficients", "block", block, self.block)
        check("coefficients", "table checksum", table, checksum)
        check("coefficients", "number of blocks", num_blocks, sum(blocks))
        check("coefficients", "number count", count, total)
        middle = HEADER.size + 2 * num_blocks
        check("coefficients", "length", len(payload), middle + num_bytes(total, self._number.bits))
        scales = np.frombuffer(payload, "<f2", num_blocks, HEADER.size)
        numbers = self._unpacked(payload[middle:], total)
        tensors, at, first = {}, 0, 0
        for (name, shape), step_count in zip(shapes.items(), blocks, strict=True):
            part, steps = numbers[at : at + numel(shape)], scales[first : first + step_count]
            values = self._dequantize(part, steps, exponent)
            if values is None:
                raise WireError(f"coefficients: got steps or numbers out of range in tensor {name!r}: it is altered.")
            tensors[name] = torch.from_numpy(values.reshape(shape))
            at, first = at + part.size, first + step_count
        return TensorUpdate(tensors)

    def predict_bytes(self, update_numel: dict[str, int], num_pairs: int) -> int:
        """Exact."""
        blocks = sum(-(-count // self.block) for count in update_numel.values())
        return HEADER.size + 2 * blocks + num_bytes(sum(update_numel.values()), self._number.bits)


METHOD = Coefficients
