"""Levels of a normal number: a tensor as mean + deviation · level, with b bits for the level of each number.

A level is the median of a standard normal number between two thresholds, a threshold lies halfway between two levels
(±0.6745 for 1 bit): Jie et al., "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision
Redundancy", arXiv 2307.16867.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from statistics import NormalDist

import numpy as np

ITERATIONS = 500  # published code; up to 4 bits the sixth digit rests long before
DIGITS = 6  # so that every machine has the same bits


@cache
def gaussian_levels(bits: int) -> np.ndarray:
    """(2^bits,) rising float64, read-only."""
    normal, count = NormalDist(), 1 << (bits - 1)
    half = [normal.inv_cdf((1 + (k + 0.5) / count) / 2) for k in range(count)]
    for _ in range(ITERATIONS):
        below = [normal.cdf(x) for x in (0.0, *(sum(pair) / 2 for pair in pairwise(half)))]
        half = [normal.inv_cdf((low + high) / 2) for low, high in pairwise([*below, 1.0])]
    positive = np.round(half, DIGITS)
    levels = np.r_[-positive[::-1], positive]
    levels.flags.writeable = False
    return levels


def gaussian_thresholds(bits: int) -> np.ndarray:
    """(2^bits - 1,) rising float64: from which on a number is of the next level."""
    levels = gaussian_levels(bits)
    return (levels[1:] + levels[:-1]) / 2


def fitted(values: np.ndarray, bits: int) -> tuple[float, float, np.ndarray]:
    """Mean, deviation and (n,) uint8 places of levels for (n,) float64 values.

    Places are those of the values' own mean and deviation; the two numbers that are returned are then the best ones
    for these places (least squares). So numbers that are levels of some mean and deviation come back as they were.
    """
    mean, deviation = float(values.mean()), float(values.std())
    places = np.searchsorted(gaussian_thresholds(bits), (values - mean) / (deviation or 1.0)).astype(np.uint8)
    level = gaussian_levels(bits)[places]
    middle = float(level.mean())
    level -= middle
    spread = float(level @ level)
    slope = float(level @ values) / spread if deviation and spread else 0.0
    return mean - slope * middle, slope, places
