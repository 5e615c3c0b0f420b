"""A number in one byte: a sign and 127 magnitudes, each e^(1/8) times the one below it.

Byte 0 is 0; 0x80 does not exist. Otherwise bit 7 is the sign (1: negative) and the other seven bits m say
e^((m - 64) / 8): 3.8e-4 to 2.6e3, in steps of 13.3 %. Magnitudes are made in decimal arithmetic and rounded once to
float64, so every machine has the same.
"""

from decimal import Decimal

import numpy as np

from kilotune.codec._codes import rounded

STEPS, MIDDLE, LARGEST = 8, 64, 127
SIGN, NO_BYTE = 0x80, 0x80
MAGNITUDES = np.array([0.0] + [float((Decimal(m - MIDDLE) / STEPS).exp()) for m in range(1, LARGEST + 1)])
"""(128,) float64, rising."""


def to_bytes(values: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    """(n,) uint8 of (n,) float64: to the nearest, the smaller one at a tie; with `rng` to one of both neighbours so
    that the mean is the number. What is beyond the largest magnitude becomes it."""
    sizes = np.minimum(np.abs(values), MAGNITUDES[-1])
    chosen = rounded(MAGNITUDES, sizes, rng)
    return np.where((chosen > 0) & (values < 0), chosen | SIGN, chosen).astype(np.uint8)


def from_bytes(codes: np.ndarray) -> np.ndarray:
    """(n,) float64."""
    sizes = MAGNITUDES[codes & LARGEST]
    return np.where(codes & SIGN, -sizes, sizes)
