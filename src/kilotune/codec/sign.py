"""Sign: one bit per number and one scale per block: decoded = scale · sign(x), scale = mean |x|.

Source: Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed", arXiv
2102.02888 (its compressor, to go inside `residual`); scale `mean` as in Karimireddy et al., "Error Feedback Fixes
SignSGD and other Gradient Compression Schemes", arXiv 1901.09847.
Departs: the scale is the mean magnitude, the nearest one in the least squares; `rms` is that of DeepSpeed's code. Zero
counts as positive, since a sign cannot say 0; a block of zeros has scale 0 and stays zero.
Wire: "SGN1" | u8 1 | u8 0 | u32 block, 0 is the whole tensor | u32 table checksum | u64 n | fp32 scale of each block |
n bits, 1 is negative; little-endian, 22 + 4·blocks + ⌈n/8⌉ bytes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from kilotune.codec import Codec, State, TensorUpdate, Update, WireContext, WireError
from kilotune.codec._codes import Frame, spread
from kilotune.codec._vector import by_tensor, flatten, rebuild

MAGIC = b"SGN1"


class Sign(Codec):
    """Signs of all numbers."""

    block: int = Field(0, ge=0, lt=2**32, description="numbers that share a scale; 0: all of a tensor, as in the paper")
    scale: Literal["mean", "rms"] = Field("mean", description="mean magnitude, or root mean square (DeepSpeed)")

    @property
    def _frame(self) -> Frame:
        return Frame("sign", MAGIC, 1, 0, self.block)

    def encode(self, update: Update, context: WireContext, state: State) -> bytes:
        """Keeps no state."""
        vector, scales, codes = flatten("sign", update, context), [], []
        for part in by_tensor(vector, context.shapes):
            scales.append(self._scales(part.astype(np.float64)))
            codes.append((part < 0).astype(np.uint8))
        return self._frame.write(context.shapes, scales, codes)

    def _scales(self, part: np.ndarray) -> np.ndarray:
        if not part.size:
            return np.zeros(0)
        size = np.abs(part) if self.scale == "mean" else part * part
        if self.block == 0:
            means = size.mean(keepdims=True)
        else:
            starts = np.arange(0, part.size, self.block)
            means = np.add.reduceat(size, starts) / np.minimum(self.block, part.size - starts)
        return means if self.scale == "mean" else np.sqrt(means)

    def decode(self, payload: bytes, context: WireContext) -> TensorUpdate:
        """Fresh float32 tensors in name order."""
        scales, codes = self._frame.read(context.shapes, payload)
        if (scales < 0).any():
            raise WireError("sign: got a negative scale. The payload is altered.")
        values = spread(scales[:, 0], context.shapes, self.block)
        return rebuild("sign", np.where(codes, -values, values), context.shapes)

    def predict_bytes(self, update_numel: dict[str, int], num_pairs: int) -> int:
        """Exact."""
        return self._frame.size(update_numel)


METHOD = Sign
