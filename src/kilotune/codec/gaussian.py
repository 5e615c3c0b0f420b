"""Gaussian levels: every tensor as mean + deviation · level, with b bits for the level of each number.

Source: Jie et al., "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy",
arXiv 2307.16867: how its adapters are stored (core/levels.py). What `low_bit_lora` computes with arrives as it was.
Departs: mean and deviation are fitted to the levels that were chosen, which is the nearest for what is no level yet,
such as the change of any adapter.
Wire: "GAU1" | u8 bits | u8 0 | u32 0 | u32 table checksum | u64 n | fp32 mean and deviation of each tensor | n codes,
the level's place from the lowest; little-endian, 22 + 8·tensors + ⌈bits·n/8⌉ bytes.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from kilotune.codec import Codec, State, TensorUpdate, Update, WireContext, WireError
from kilotune.codec._codes import Frame, spread
from kilotune.codec._vector import by_tensor, flatten, rebuild
from kilotune.core.levels import fitted, gaussian_levels

MAGIC = b"GAU1"


class Gaussian(Codec):
    """All numbers of an update as a few levels of their tensor's distribution."""

    gives: ClassVar[frozenset[str]] = frozenset({"values"})

    bits: int = Field(1, ge=1, le=8, description="bits per number; paper: 1")

    @property
    def _frame(self) -> Frame:
        return Frame("gaussian", MAGIC, self.bits, 0, 0, facts=2)

    def encode(self, update: Update, context: WireContext, state: State) -> bytes:
        """Keeps no state."""
        vector, facts, codes = flatten("gaussian", update, context), [], []
        for part in by_tensor(vector, context.shapes):
            if part.size:
                *fact, places = fitted(part.astype(np.float64), self.bits)
                facts.append(np.array(fact))
                codes.append(places)
        return self._frame.write(context.shapes, facts, codes)

    def decode(self, payload: bytes, context: WireContext) -> TensorUpdate:
        """Fresh float32 tensors in name order; sums and products in float64, rounded once."""
        facts, codes = self._frame.read(context.shapes, payload)
        if (facts[:, 1] < 0).any():
            raise WireError("gaussian: got a negative deviation. The payload is altered.")
        mean, deviation = (spread(column, context.shapes, 0).astype(np.float64) for column in facts.T)
        with np.errstate(over="ignore"):
            values = (mean + deviation * gaussian_levels(self.bits)[codes]).astype(np.float32)
        return rebuild("gaussian", values, context.shapes)

    def predict_bytes(self, update_numel: dict[str, int], num_pairs: int) -> int:
        """Exact."""
        return self._frame.size(update_numel)


METHOD = Gaussian
