"""Quantized: b bits per number, a sign and one of 2^(b-1) magnitudes between 0 and the largest of its block.

Source: Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding", arXiv 1610.02132
(grid `linear`); Douillard et al., "Streaming DiLoCo with overlapping communication: Towards a Distributed Free Lunch",
arXiv 2501.18512 (grid `powers` with 4 bits: the E3M0 floats of its outer gradients).
Departs: levels are relative to the largest magnitude of a block, not to the norm; no entropy coder behind. The lowest
code of `powers` is 0, so it has 7 powers of two, 1 to 2^-6 of the block's largest number.
Wire: "QNT1" | u8 bits | u8 grid (0 linear, 1 powers) | u32 block | u32 table checksum | u64 n | fp32 scale of each
block | n codes, sign above level; little-endian, 22 + 4·blocks + ⌈bits·n/8⌉ bytes. Decoded: ± level · scale; with 1 bit
+scale or -scale.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from kilotune.codec import Codec, State, TensorUpdate, Update, WireContext, WireError
from kilotune.codec._blocks import block_peaks
from kilotune.codec._codes import Frame, rounded, spread
from kilotune.codec._vector import by_tensor, flatten, rebuild
from kilotune.core.rng import stream

MAGIC = b"QNT1"
GRIDS = {"linear": 0, "powers": 1}


class Quantized(Codec):
    """All numbers of an update in a few bits each."""

    bits: int = Field(4, ge=1, le=8, description="bits per number; 4 in both papers")
    grid: Literal["linear", "powers"] = Field("linear", description="levels in equal steps, or powers of two (E3M0)")
    rounding: Literal["stochastic", "nearest"] = Field(
        "stochastic", description="stochastic: the mean over many roundings is the number itself, as in QSGD"
    )
    block: int = Field(512, ge=1, lt=2**32, description="numbers that share a scale; bucket of QSGD's experiments")

    @model_validator(mode="before")
    @classmethod
    def _one_bit(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("bits") == 1 and values.get("rounding") == "nearest":
            raise ValueError("more than 1 bit with rounding: nearest; use the codec sign")
        return values

    @property
    def bounded_loss(self) -> bool:
        """Nearest: a number loses at most itself. Stochastic: if all variances together stay below the square norm."""
        if self.rounding == "nearest":
            return True
        levels = self._levels() / self._levels()[-1]
        steps = (levels[2:] - levels[1:-1]) ** 2 / (4 * levels[2:] * levels[1:-1])
        lowest = levels[1] if levels[0] == 0 else 2.0
        return bool(self.block * lowest**2 / 4 + steps.max(initial=0.0) < 1)

    def _levels(self) -> np.ndarray:
        """Magnitudes in units of the scale, rising."""
        count = 1 << (self.bits - 1)
        if count == 1:
            return np.ones(1)
        return np.arange(count) * 1.0 if self.grid == "linear" else np.r_[0.0, 2.0 ** np.arange(2.0 - count, 1)]

    @property
    def _frame(self) -> Frame:
        return Frame("quantized", MAGIC, self.bits, GRIDS[self.grid], self.block)

    def encode(self, update: Update, context: WireContext, state: State) -> bytes:
        """Stochastic rounding draws from the sender's private generator; the server's, from a public one."""
        vector, scales, codes = flatten("quantized", update, context), [], []
        rng = context.rng or stream(context.root, "quantized", context.round)
        for part in (part.astype(np.float64) for part in by_tensor(vector, context.shapes)):
            scale = self._scale(part)
            ratio = np.divide(part, np.repeat(scale, self.block)[: part.size], out=part, where=part != 0)
            scales.append(scale)
            codes.append(self._codes(ratio, rng))
        return self._frame.write(context.shapes, scales, codes)

    def _scale(self, part: np.ndarray) -> np.ndarray:
        """float32, rounded up, so that no ratio is beyond the largest level."""
        exact = block_peaks(part, self.block) / self._levels()[-1]
        scale = exact.astype(np.float32)
        return np.where(scale < exact, np.nextafter(scale, np.float32(np.inf)), scale)

    def _codes(self, ratio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        levels, size = self._levels(), np.abs(ratio)
        if levels.size == 1:
            return (rng.random(ratio.size) < (1 - ratio) / 2).astype(np.uint8)
        level = rounded(levels, size, rng if self.rounding == "stochastic" else None)
        return (level + np.where((ratio < 0) & (level > 0), levels.size, 0)).astype(np.uint8)

    def decode(self, payload: bytes, context: WireContext) -> TensorUpdate:
        """Fresh float32 tensors in name order; products are exact in float64 and rounded once."""
        scales, codes = self._frame.read(context.shapes, payload)
        levels = self._levels()
        if (scales < 0).any() or (levels.size > 1 and (codes == levels.size).any()):
            raise WireError("quantized: got a negative scale or a negative zero. The payload is altered.")
        values = np.r_[levels, -levels][codes] * spread(scales[:, 0], context.shapes, self.block)
        with np.errstate(over="ignore"):
            return rebuild("quantized", values.astype(np.float32), context.shapes)

    def predict_bytes(self, update_numel: dict[str, int], num_pairs: int) -> int:
        """Exact."""
        return self._frame.size(update_numel)


METHOD = Quantized
