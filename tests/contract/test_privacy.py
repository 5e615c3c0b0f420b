"""Laws of every privacy method the registry finds: bounded contributions, noise of the promised size, from secrets."""

import math

import numpy as np
import pytest
import torch

from kilotune.core.registry import find, names
from kilotune.core.rng import stream
from kilotune.privacy import GRID, Privacy
from kilotune.privacy._secret import gaussians

KEY = bytes(range(32))
NOISE = 0.7
METHODS = names("privacy")


def build(name: str, **changes: float) -> Privacy:
    method = find("privacy", name)
    return method(**{**method.example, "clip": 0.3, **changes})


def values(case: str) -> np.ndarray:
    rng = stream(0, "privacy", case)
    plain = rng.standard_normal(257)
    cases = {
        "short": plain * 1e-3,
        "long": plain * 1e4,
        "huge": plain * 1e37,
        "one": np.eye(257)[3] * 5.0,
        "nothing": plain * 0.0,
        "infinite": np.where(np.arange(257) % 50 == 0, np.inf, plain),
        "minus": np.where(np.arange(257) % 50 == 0, -np.inf, plain),
        "nan": np.where(np.arange(257) % 7 == 0, np.nan, plain),
    }
    return cases[case]


CASES = ("short", "long", "huge", "one", "nothing", "infinite", "minus", "nan")


def longest(method: Privacy, contribution: np.ndarray) -> float:
    """L2 norm of what one unit adds: the vector of a client, the one number of an example."""
    step = method.step(NOISE)
    if method.unit == "client":
        return math.sqrt(sum(int(n) ** 2 for n in contribution)) * step
    return float(np.abs(contribution).max()) * step


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", METHODS)
def test_no_values_give_a_contribution_longer_than_clip(name: str, case: str) -> None:
    """Kills: a clip that NaN, infinity or overflow pass; rounding that leads beyond the bound."""
    method = build(name)
    found = method.contribution(values(case), NOISE)
    assert found.dtype == np.int64
    assert longest(method, found) <= method.clip


@pytest.mark.parametrize("other", CASES)
@pytest.mark.parametrize("name", METHODS)
def test_replacing_one_unit_by_anything_moves_the_sum_by_at_most_twice_clip(name: str, other: str) -> None:
    """Kills: a sum in which one client or example changes what the others count for."""
    method = build(name)
    if method.unit == "client":
        crowd = [values("long"), values("short"), values("one")]
        before = sum(method.contribution(v, NOISE) for v in crowd)
        after = sum(method.contribution(v, NOISE) for v in [*crowd[:2], values(other)])
        moved = math.sqrt(sum(int(n) ** 2 for n in after - before)) * method.step(NOISE)
    else:
        batch = values("long")
        changed = batch.copy()
        changed[5] = values(other)[50]
        both = [int(method.contribution(v, NOISE).sum()) for v in (batch, changed)]
        moved = abs(both[0] - both[1]) * method.step(NOISE)
    assert moved <= 2 * method.clip


@pytest.mark.parametrize("name", METHODS)
def test_values_within_clip_are_kept_to_a_step_of_the_grid(name: str) -> None:
    """Kills: shrinking what needs no clip; a grid so coarse that it shows beside the noise."""
    method = build(name)
    kept = method.contribution(values("short"), NOISE) * method.step(NOISE)
    np.testing.assert_allclose(kept, values("short"), rtol=0, atol=1.001 * method.step(NOISE))
    assert method.step(NOISE) * GRID == pytest.approx(NOISE * method.clip, rel=1e-15)


def test_a_long_vector_keeps_its_direction_and_gets_the_norm_of_clip() -> None:
    """Kills: clipping number by number, which turns the update."""
    method = build("central")
    vector = values("long")
    kept = method.contribution(vector, NOISE) * method.step(NOISE)
    np.testing.assert_allclose(kept, vector / np.linalg.norm(vector) * 0.3, rtol=0, atol=1.001 * method.step(NOISE))


@pytest.mark.parametrize("name", METHODS)
def test_the_noise_has_the_promised_size_and_shape(name: str) -> None:
    """Kills: noise in units of the mean, variance for standard deviation, a factor 2. Bounds: 4.5 sigma, key fixed."""
    method, n = build(name), 200_000
    noise = method.release(np.zeros(n, np.int64), NOISE, KEY)
    std = NOISE * method.clip
    assert abs(noise.std() / std - 1) <= 4.5 / math.sqrt(2 * n)
    assert abs(noise.mean() / std) <= 4.5 / math.sqrt(n)
    for edge in (0.5, 1.0, 2.0, 3.0):
        p = math.erfc(edge / math.sqrt(2))
        assert abs((np.abs(noise) > edge * std).mean() - p) <= 4.5 * math.sqrt(p * (1 - p) / n)
    assert abs(np.corrcoef(noise[: n // 2], noise[n // 2 :])[0, 1]) <= 4.5 / math.sqrt(n // 2)
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) <= 4.5 / math.sqrt(n)


@pytest.mark.parametrize("name", METHODS)
def test_a_release_is_the_sum_and_the_noise(name: str) -> None:
    """Kills: noise that replaces the sum, or depends on it."""
    method, total = build(name), np.arange(-500, 500) * GRID
    noise = method.release(np.zeros(1000, np.int64), NOISE, KEY)
    np.testing.assert_allclose(
        method.release(total, NOISE, KEY) - noise, total * method.step(NOISE), rtol=0, atol=1e-9 * NOISE
    )


def test_public_seeds_do_not_choose_the_noise() -> None:
    """Kills: noise from numpy's or torch's global generator, which a recipe's reader could take off again."""

    def seeded() -> np.ndarray:
        torch.manual_seed(7)
        np.random.seed(7)
        return gaussians(64)

    first, second = seeded(), seeded()
    assert not np.isclose(first, second).any()
    assert np.array_equal(gaussians(64, KEY), gaussians(64, KEY))  # so that the key is all there is to it
    assert not np.isclose(gaussians(64, KEY), gaussians(64, KEY[::-1])).any()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_without_noise_is_refused(name: str) -> None:
    """Kills: a recipe that says privacy and adds none."""
    with pytest.raises(ValueError, match="an epsilon, a noise_multiplier, or both"):
        build(name, noise_multiplier=None)
