"""Quantized: golden bytes, the bound of rounding, the mean of stochastic rounding, the 4-bit floats."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from kilotune.codec import TensorUpdate, WireContext, WireError
from kilotune.codec._codes import pack, unpack
from kilotune.codec._frame import table_checksum
from kilotune.codec.quantized import Quantized
from kilotune.core.rng import stream


def context(size: int, sender: int = 0) -> WireContext:
    return WireContext(1, 3, {"x": (size,)}, 0, stream(sender, "codec"))


def through(codec: Quantized, x: torch.Tensor, sender: int = 0) -> torch.Tensor:
    wire = context(x.numel(), sender)
    return codec.decode(codec.encode(TensorUpdate({"x": x}), wire, {}), wire).tensors["x"]


def vector(size: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(stream(seed, "quantized").normal(size=size).astype(np.float32))


def test_golden_bytes() -> None:
    """Kills: a change of the wire format without a new version digit; a sign below the level; low halves first."""
    x = torch.tensor([7.0, -1.0, 0.4, -0.4, 2.6, 0.0, -14.0])
    payload = Quantized(rounding="nearest", block=6).encode(TensorUpdate({"x": x}), context(7), {})
    table = table_checksum({"x": (7,)}).to_bytes(4, "little").hex()
    # scales 1 and 2; levels 7, -1, 0, 0, 3, 0 and -7
    assert payload == bytes.fromhex(f"514e5431 04 00 06000000 {table} 0700000000000000 0000803f 00000040 790030f0")


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
def test_nearest_rounding_stays_within_half_a_step(bits: int) -> None:
    """Kills: cut instead of rounded numbers; a scale rounded down, so that the largest number is cut off."""
    x = vector(1000) * torch.logspace(-3, 3, 1000)
    got = through(Quantized(bits=bits, rounding="nearest", block=64), x)
    for part, decoded in zip(x.split(64), got.split(64), strict=True):
        step = float(part.abs().max()) / (2 ** (bits - 1) - 1)
        assert (decoded - part).abs().max() <= step / 2 * (1 + 2.0**-20)
        assert torch.isclose(decoded.abs().max(), part.abs().max(), rtol=2.0**-22, atol=0)


@pytest.mark.parametrize(("bits", "grid"), [(1, "linear"), (2, "linear"), (4, "linear"), (4, "powers")])
def test_the_mean_of_stochastic_rounding_is_the_number(bits: int, grid: str) -> None:
    """E[decoded] = x. Kills: a threshold of 1/2; shares of the wrong neighbour. 40,000 roundings, 5 standard errors,
    the variance of one at most a quarter of the square of the widest step."""
    x = torch.tensor([1.0, -0.7, 0.3, -0.06, 0.011, 0.0, 0.99, -1.0])
    repeats = 40_000
    got = through(Quantized(bits=bits, grid=grid, block=8), x.repeat(repeats)).reshape(repeats, 8).double()
    widest = 2.0 if bits == 1 else 1 / (2 ** (bits - 1) - 1) if grid == "linear" else 0.5
    assert (got.mean(0) - x.double()).abs().max() <= 5 * widest / 2 / repeats**0.5
    if bits > 1:
        assert torch.equal(got[:, [0, 5, 7]], x[[0, 5, 7]].double().expand(repeats, 3))  # exact levels stay


def test_e3m0_floats_are_powers_of_two_of_the_largest_number() -> None:
    """Kills: a mantissa; rounding of exponents instead of numbers; the lowest power in place of 0."""
    x = torch.tensor([-64.0, 33.0, 30.0, 2.9, -3.1, 1.0, 0.6, 0.4, 0.0])
    got = through(Quantized(grid="powers", rounding="nearest"), x)
    assert got.tolist() == [-64.0, 32.0, 32.0, 2.0, -4.0, 1.0, 1.0, 0.0, 0.0]


def test_senders_round_with_private_numbers_and_the_server_with_public_ones() -> None:
    """Kills: errors of all clients that point the same way; a downlink that cannot be made again."""
    x = vector(512)
    assert not torch.equal(through(Quantized(), x, sender=1), through(Quantized(), x, sender=2))
    server = WireContext(1, 3, {"x": (512,)})
    first, second = (Quantized().encode(TensorUpdate({"x": x}), server, {}) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("factor", [1e-44, 1e-38, 1e37])
def test_tiny_and_huge_blocks_survive(factor: float) -> None:
    """Kills: 0 / 0 for scales that underflow; infinity for products."""
    x = (vector(100).double().clamp(-1, 1) * factor).float()
    got = through(Quantized(bits=8, rounding="nearest"), x)
    assert ((got - x).abs() <= float(x.abs().max()) / 127 * 0.51 + 1.5e-45 * 64).all()


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_packed_codes_come_back(bits: int) -> None:
    """Kills: codes across a byte's edge; a chunk that does not end with a byte."""
    for size in (0, 1, 7, 8, 9, (1 << 20) + 3):
        codes = stream(size, "codes").integers(0, 1 << bits, size).astype(np.uint8)
        raw = pack(codes, bits)
        assert len(raw) == -(-size * bits // 8)
        assert np.array_equal(unpack("x", raw, bits, size), codes)
    assert pack(np.array([1, 0, 1], np.uint8), bits)[:1] == (
        1 << (8 - bits) | (1 << (8 - 3 * bits) if bits < 3 else 0)
    ).to_bytes(1, "big")


def test_settings_that_cannot_work_are_refused() -> None:
    """Kills: one bit rounded to the nearest of two signs, which `sign` does better."""
    with pytest.raises(ValidationError, match="use the codec sign"):
        Quantized(bits=1, rounding="nearest")


def test_negative_zeros_are_refused() -> None:
    """Kills: two payloads of one meaning."""
    payload = bytearray(Quantized().encode(TensorUpdate({"x": vector(64)}), context(64), {}))
    payload[-1] = 0x08
    with pytest.raises(WireError, match="negative zero"):
        Quantized().decode(bytes(payload), context(64))
