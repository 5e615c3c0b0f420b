"""Gaussian levels on the wire: sizes, values."""

import numpy as np
import pytest
import torch

from kilotune.codec import TensorUpdate, WireContext
from kilotune.codec.gaussian import Gaussian
from kilotune.core.levels import gaussian_levels
from kilotune.core.rng import stream

SHAPES = {"a": (13, 7), "b": (2000,), "c": ()}
WIRE = WireContext(1, 0, SHAPES)


def update() -> TensorUpdate:
    rng = stream(0, "gaussian")
    spread = {"a": (1e-3, -2e-3), "b": (5.0, 1.0), "c": (1.0, 0.0)}
    values = {n: np.asarray(rng.normal(size=s) * spread[n][0] + spread[n][1], np.float32) for n, s in SHAPES.items()}
    return TensorUpdate({name: torch.from_numpy(value) for name, value in values.items()})


@pytest.mark.parametrize("bits", [1, 3])
def test_numbers_become_the_nearest_level_of_their_tensor(bits: int) -> None:
    """Mean and deviation of the payload are those of a line through (level, number), by numpy's least squares.

    Kills: one mean for all tensors; the deviation forgotten; codes of another order."""
    payload = Gaussian(bits=bits).encode(update(), WIRE, {})
    assert len(payload) == 22 + 3 * 8 + -(-(91 + 2000 + 1) * bits // 8)
    got = Gaussian(bits=bits).decode(payload, WIRE).tensors
    levels = gaussian_levels(bits)
    for name, value in update().tensors.items():
        x = value.double().reshape(-1).numpy()
        if x.size == 1:
            assert float(got[name]) == float(value)
            continue
        level = levels[np.abs((x - x.mean())[:, None] / x.std() - levels).argmin(1)]
        line, *_ = np.linalg.lstsq(np.stack([np.ones_like(level), level], 1), x, rcond=None)
        assert np.abs(got[name].reshape(-1).numpy() - line[0] - line[1] * level).max() <= 4e-7 * np.abs(x).max()
        assert got[name].unique().numel() == 2**bits


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_numbers_on_levels_arrive_as_they_were(bits: int) -> None:
    """Kills: the numbers' own deviation, which is less than that of the normal numbers the levels stand for."""
    once = Gaussian(bits=bits).decode(Gaussian(bits=bits).encode(update(), WIRE, {}), WIRE)
    again = Gaussian(bits=bits).decode(Gaussian(bits=bits).encode(once, WIRE, {}), WIRE)
    for name, value in once.tensors.items():
        torch.testing.assert_close(again.tensors[name], value, atol=0, rtol=2e-6)
