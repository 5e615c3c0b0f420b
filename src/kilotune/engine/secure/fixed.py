"""Fixed point: q = clip(round(x · 2^e), ±top) · weight, as words modulo 2^bits; sums of them are exact.

2^e is the largest power of two with max_clients · max_weight · clip · 2^e < 2^(bits - 1), so no sum can wrap around.
It follows from the recipe alone: who takes part or drops out changes no client's integers.
Wire: words in front of the numbers: the weight; then, times the weight, the training loss and the fraction of numbers
that were clipped. The server learns their sums only.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

FRONT = 3  # words before the numbers
LOSS_TOP = 16.0  # a larger loss counts as this
LEAST_LEVELS = 16


@dataclass(frozen=True)
class Mean:
    """What the server learns of a round."""

    numbers: np.ndarray  # (n,) float64, the weighted mean
    weight: int  # sum of the weights
    loss: float
    clipped_frac: float


@dataclass(frozen=True)
class FixedPoint:
    """The agreement of all clients of a recipe about their integers."""

    clip: float
    bits: Literal[16, 32]
    max_clients: int
    max_weight: int
    rounding: Literal["nearest", "stochastic"]

    @property
    def dtype(self) -> np.dtype:
        """Of a word on the wire."""
        return np.dtype(f"<u{self.bits // 8}")

    @property
    def levels(self) -> int:
        """Positive values that a number can take."""
        return self._grid(self.clip)[1]

    def words(self, values: np.ndarray, weight: int, loss: float | None, rng: np.random.Generator) -> np.ndarray:
        """(3 + n,) words of one client; `values` (n,) finite. `rng` rounds up or down when rounding is stochastic.
        `loss` None: neither the loss nor how much was clipped is told."""
        if not 1 <= weight <= self.max_weight:
            raise ValueError(f"fixed point: got weight {weight}, expected 1 to {self.max_weight}.")
        exponent, top = self._grid(self.clip)
        scaled = np.ldexp(values.astype(np.float64), exponent)
        rounded = np.rint(scaled) if self.rounding == "nearest" else np.floor(scaled + rng.random(values.size))
        numbers = np.clip(rounded, -top, top).astype(np.int64)
        clipped = float(np.mean(np.abs(values) > self.clip)) if values.size and loss is not None else 0.0
        front = [1, self._fact(loss or 0.0, LOSS_TOP), self._fact(clipped, 1.0)]
        whole = weight * np.concatenate([np.array(front, np.int64), numbers])
        return (whole & ((1 << self.bits) - 1)).astype(self.dtype)

    def mean(self, words: np.ndarray, clients: int) -> Mean | None:
        """The mean of so many clients from the sum of their words; None when no such clients give this sum."""
        whole = words.view(np.dtype(f"<i{self.bits // 8}")).astype(np.int64)
        weight, (exponent, top) = int(whole[0]), self._grid(self.clip)
        if not clients <= weight <= clients * self.max_weight or np.abs(whole[FRONT:]).max(initial=0) > weight * top:
            return None
        loss = math.ldexp(int(whole[1]), -self._grid(LOSS_TOP)[0]) / weight
        clipped = math.ldexp(int(whole[2]), -self._grid(1.0)[0]) / weight
        return Mean(np.ldexp(whole[FRONT:].astype(np.float64), -exponent) / weight, weight, loss, clipped)

    def _fact(self, value: float, limit: float) -> int:
        exponent, top = self._grid(limit)
        finite = min(max(value, 0.0), limit) if math.isfinite(value) else limit
        return min(round(math.ldexp(finite, exponent)), top)

    def _grid(self, limit: float) -> tuple[int, int]:
        """e, and the integer that `limit` becomes."""
        room = ((1 << (self.bits - 1)) - 1) // (self.max_clients * self.max_weight)  # of one client's number
        exponent = math.frexp(max(room, 1) / limit)[1]
        while math.ldexp(limit, exponent) > room and exponent > -1000:
            exponent -= 1
        return exponent, math.floor(math.ldexp(limit, exponent))
