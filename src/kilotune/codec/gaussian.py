"""Gaussian levels: every tensor as mean + deviation · level, with b bits for the level of each number.

Source: Jie et al., "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy",
arXiv 2307.16867: how its adapters are stored. Levels are the medians of a normal number between thresholds, the
thresholds halfway between the levels (±0.6745 for 1 bit).
Departs: what is rounded is the change of an adapter after training, not its weights within it; the deviation is taken
as it is, without 1e-5 added, which would be far above a change of 1e-6.
Wire: "GAU1" | u8 bits | u8 0 | u32 0 | u32 table checksum | u64 n | fp32 mean and deviation of each tensor | n codes,
the level's place from the lowest; little-endian, 22 + 8·tensors + ⌈bits·n/8⌉ bytes.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from kilotune.codec import Codec, State, TensorUpdate, Update, WireContext, WireError
from kilotune.codec._codes import Frame, spread
from kilotune.codec._vector import by_tensor, flatten, rebuild

MAGIC = b"GAU1"
POSITIVE = {  # the other half is negative; six digits, so that every machine has the same bits
    1: (0.674490,),
    2: (0.377754, 1.265720),
    3: (0.202624, 0.625420, 1.113729, 1.792025),
    4: (0.105550, 0.319036, 0.540072, 0.775192, 1.034006, 1.333107, 1.707738, 2.265491),
}


class Gaussian(Codec):
    """All numbers of an update as a few levels of their tensor's distribution."""

    bits: int = Field(1, ge=1, le=4, description="bits per number; paper: 1")

    @property
    def _frame(self) -> Frame:
        return Frame("gaussian", MAGIC, self.bits, 0, 0, facts=2)

    def _levels(self) -> np.ndarray:
        half = np.array(POSITIVE[self.bits])
        return np.r_[-half[::-1], half]

    def encode(self, update: Update, context: WireContext, state: State) -> bytes:
        """Keeps no state."""
        vector, facts, codes = flatten("gaussian", update, context), [], []
        levels = self._levels()
        thresholds = (levels[1:] + levels[:-1]) / 2
        for part in (part.astype(np.float64) for part in by_tensor(vector, context.shapes)):
            if not part.size:
                continue
            mean, deviation = part.mean(), part.std()
            facts.append(np.array([mean, deviation]))
            codes.append(np.searchsorted(thresholds, (part - mean) / (deviation or 1.0)).astype(np.uint8))
        return self._frame.write(context.shapes, facts, codes)

    def decode(self, payload: bytes, context: WireContext) -> TensorUpdate:
        """Fresh float32 tensors in name order; sums and products in float64, rounded once."""
        facts, codes = self._frame.read(context.shapes, payload)
        if (facts[:, 1] < 0).any():
            raise WireError("gaussian: got a negative deviation. The payload is altered.")
        mean, deviation = (spread(column, context.shapes, 0).astype(np.float64) for column in facts.T)
        with np.errstate(over="ignore"):
            return rebuild("gaussian", (mean + deviation * self._levels()[codes]).astype(np.float32), context.shapes)

    def predict_bytes(self, update_numel: dict[str, int], num_pairs: int) -> int:
        """Exact."""
        return self._frame.size(update_numel)


METHOD = Gaussian
