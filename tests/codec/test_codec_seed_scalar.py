"""Seed and scalar: golden bytes, the paper's size, order of pairs."""

import numpy as np
import pytest

from kilotune.codec import SeedUpdate, WireContext, WireError
from kilotune.codec.seed_scalar import SeedScalar
from kilotune.core.rng import stream


def context(size: int) -> WireContext:
    return WireContext(1, 0, {"w": (3,)}, size)


def pairs(count: int, size: int) -> SeedUpdate:
    rng = stream(0, "pairs")
    return SeedUpdate(rng.integers(0, size, count), rng.normal(size=count).astype(np.float32))


@pytest.mark.parametrize(
    ("size", "dtype", "golden"),
    [
        (4096, "fp32", "53445331 00 02 02000000 0201 0100 0000803f 000000bf"),
        (4096, "fp16", "53445331 01 02 02000000 0201 0100 003c 00b8"),
        (65537, "fp32", "53445331 00 04 02000000 02010000 01000000 0000803f 000000bf"),
    ],
)
def test_golden_bytes(size: int, dtype: str, golden: str) -> None:
    """Kills: any change of the wire format without a new version digit."""
    update = SeedUpdate(np.array([258, 1]), np.array([1.0, -0.5], np.float32))
    assert SeedScalar(coef_dtype=dtype).encode(update, context(size), {}) == bytes.fromhex(golden)


def test_two_hundred_steps_cost_1200_bytes_and_a_header() -> None:
    """Kills: wide indices for 4,096 directions; the uplink of the paper is 200 * (2 + 4) bytes."""
    payload = SeedScalar().encode(pairs(200, 4096), context(4096), {})
    assert len(payload) == 1210 == SeedScalar().predict_bytes({"coords": 4096}, 200)


@pytest.mark.parametrize("size", [0, 65536, 65537, 10**6])
def test_pairs_come_back_in_their_order_with_repeats(size: int) -> None:
    """Kills: sorting or summing pairs, which FedKSeed-Pro must count one by one; 16-bit wrap-around."""
    update = pairs(300, size or 10**6)
    update.indices[5] = update.indices[9] = (size or 2**32) - 1
    payload = SeedScalar().encode(update, context(size), {})
    got = SeedScalar().decode(payload, context(size))
    assert got.indices.tolist() == update.indices.tolist()
    assert got.coefs.tolist() == update.coefs.tolist()
    assert size == 0 or len(payload) == SeedScalar().predict_bytes({"coords": size}, 300)


def test_no_pairs_are_a_valid_update() -> None:
    """Kills: an error when every step of a client was skipped."""
    payload = SeedScalar().encode(pairs(0, 5), context(5), {})
    assert len(payload) == 10
    assert SeedScalar().decode(payload, context(5)).indices.size == 0


@pytest.mark.parametrize("bad", [-1, 4096, 70000])
def test_directions_outside_the_basis_are_refused_on_both_sides(bad: int) -> None:
    """Kills: silent wrap-around on encode; an index error deep in the basis on decode."""
    update = SeedUpdate(np.array([3, bad]), np.ones(2, np.float32))
    with pytest.raises(WireError, match=rf"direction {bad}, expected 0 <= index < 4096"):
        SeedScalar().encode(update, context(4096), {})
    if bad == 4096:
        with pytest.raises(WireError, match="direction 4096, expected 0 <= index < 4000"):
            SeedScalar().decode(SeedScalar().encode(update, context(5000), {}), context(4000))


def test_coefficients_outside_fp16_are_refused_with_the_way_out() -> None:
    """Kills: infinity on the wire because a finite number was too large."""
    update = SeedUpdate(np.array([3]), np.array([1e5], np.float32))
    with pytest.raises(WireError, match="coef_dtype: fp32"):
        SeedScalar(coef_dtype="fp16").encode(update, context(10), {})
