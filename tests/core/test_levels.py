"""Gaussian levels against their definition."""

from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest

from kilotune.core.levels import gaussian_levels, gaussian_thresholds


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_are_medians_between_thresholds_halfway_between_levels(bits: int) -> None:
    """Kills: means in place of medians (±0.798 for 1 bit); too few iterations. Levels are rounded to 5e-7."""
    levels = gaussian_levels(bits)
    below = [0.0, *(NormalDist().cdf(x) for x in gaussian_thresholds(bits)), 1.0]
    medians = [NormalDist().inv_cdf((low + high) / 2) for low, high in pairwise(below)]
    assert len(levels) == 2**bits
    assert np.abs(levels - medians).max() <= 1.5e-6


@pytest.mark.parametrize("bits", [5, 8])
def test_many_levels_rise_and_lie_around_zero(bits: int) -> None:
    """Their fixed point is further than the published number of iterations. Kills: a table that stops at 4 bits."""
    levels = gaussian_levels(bits)
    assert len(levels) == 2**bits
    assert (np.diff(levels) > 0).all()
    assert np.array_equal(levels, -levels[::-1])
