"""Gaussian levels: the table against its definition, sizes, values."""

from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
import torch

from kilotune.codec import TensorUpdate, WireContext
from kilotune.codec.gaussian import POSITIVE, Gaussian
from kilotune.core.rng import stream

SHAPES = {"a": (13, 7), "b": (2000,), "c": ()}
WIRE = WireContext(1, 0, SHAPES)


def update() -> TensorUpdate:
    rng = stream(0, "gaussian")
    spread = {"a": (1e-3, -2e-3), "b": (5.0, 1.0), "c": (1.0, 0.0)}
    values = {n: np.asarray(rng.normal(size=s) * spread[n][0] + spread[n][1], np.float32) for n, s in SHAPES.items()}
    return TensorUpdate({name: torch.from_numpy(value) for name, value in values.items()})


@pytest.mark.parametrize("bits", POSITIVE)
def test_levels_are_medians_between_thresholds_halfway_between_levels(bits: int) -> None:
    """Kills: means in place of medians (±0.798 for 1 bit); a digit mistyped. The table is rounded to 5e-7."""
    levels = np.r_[-np.array(POSITIVE[bits])[::-1], POSITIVE[bits]]
    below = [0.0, *(NormalDist().cdf(x) for x in (levels[1:] + levels[:-1]) / 2), 1.0]
    medians = [NormalDist().inv_cdf((low + high) / 2) for low, high in pairwise(below)]
    assert len(levels) == 2**bits
    assert np.abs(levels - medians).max() <= 1.5e-6


@pytest.mark.parametrize("bits", [1, 3])
def test_numbers_become_the_nearest_level_of_their_tensor(bits: int) -> None:
    """Kills: one mean for all tensors; the deviation forgotten; codes of another order."""
    payload = Gaussian(bits=bits).encode(update(), WIRE, {})
    assert len(payload) == 22 + 3 * 8 + -(-(91 + 2000 + 1) * bits // 8)
    got = Gaussian(bits=bits).decode(payload, WIRE).tensors
    half = torch.tensor(POSITIVE[bits], dtype=torch.float64)
    for name, value in update().tensors.items():
        x = value.double().reshape(-1)
        mean, deviation = x.mean(), x.std(correction=0)
        choices = mean + deviation * torch.cat([-half.flip(0), half])
        nearest = choices[(x[:, None] - choices).abs().argmin(1)]
        assert (got[name].reshape(-1) - nearest).abs().max() <= 2e-7 * (mean.abs() + 3 * deviation)
        assert got[name].unique().numel() == (2**bits if value.numel() > 1 else 1)
