"""Sign: golden bytes, sizes, scales."""

import numpy as np
import pytest
import torch

from kilotune.codec import TensorUpdate, WireContext, WireError
from kilotune.codec._frame import table_checksum
from kilotune.codec.sign import Sign
from kilotune.core.rng import stream


def through(codec: Sign, x: torch.Tensor) -> torch.Tensor:
    wire = WireContext(1, 0, {"x": tuple(x.shape)})
    return codec.decode(codec.encode(TensorUpdate({"x": x}), wire, {}), wire).tensors["x"]


def vector(size: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(stream(seed, "sign").normal(size=size).astype(np.float32))


def test_golden_bytes() -> None:
    """Kills: a change of the wire format without a new version digit; the first number in the lowest bit."""
    sent = TensorUpdate({"b": torch.tensor([-2.0]), "a": torch.tensor([1.0, -3.0, 0.0, 4.0, -2.0, 0.5, 1.0, 4.5])})
    wire = WireContext(1, 0, {"b": (1,), "a": (8,)})
    table = table_checksum({"a": (8,), "b": (1,)}).to_bytes(4, "little").hex()
    expected = f"53474e31 01 00 00000000 {table} 0900000000000000 00000040 00000040 48 80"
    assert Sign().encode(sent, wire, {}) == bytes.fromhex(expected)


@pytest.mark.parametrize(
    ("scale", "factor"), [("mean", lambda x: x.abs().mean()), ("rms", lambda x: x.square().mean().sqrt())]
)
@pytest.mark.parametrize("block", [0, 7, 64])
def test_every_block_has_its_own_scale(scale: str, factor, block: int) -> None:
    """Kills: one scale for all; a short last block divided by the full length."""
    x = vector(150) * torch.linspace(0.1, 10, 150)
    got = through(Sign(block=block, scale=scale), x)
    for part, decoded in zip(x.split(block or 150), got.split(block or 150), strict=True):
        assert torch.equal(decoded.sign(), part.sign())
        assert torch.equal(decoded.abs(), factor(part.double()).float().expand(part.numel()))


def test_size_is_a_bit_a_number_and_four_bytes_a_tensor() -> None:
    """Kills: a byte a sign."""
    wire = WireContext(1, 0, {"x": (13, 7), "y": (3,)})
    sent = TensorUpdate({"x": vector(91).reshape(13, 7), "y": vector(3)})
    assert len(Sign().encode(sent, wire, {})) == 22 + 2 * 4 + 12  # 94 bits


def test_blocks_of_zeros_stay_zero() -> None:
    """Kills: ± a scale for tensors that never change."""
    x = torch.cat([torch.zeros(64), vector(64)])
    assert not through(Sign(block=64), x)[:64].any()


@pytest.mark.parametrize(("offset", "raw"), [(22, b"\x00\x00\x80\xbf"), (-1, b"\x01"), (5, b"\x01")])
def test_negative_scales_and_bits_behind_the_last_number_are_refused(offset: int, raw: bytes) -> None:
    """Kills: two payloads of one meaning; an update turned round by one fact."""
    wire = WireContext(1, 0, {"x": (12,)})
    payload = bytearray(Sign().encode(TensorUpdate({"x": vector(12)}), wire, {}))
    place = offset % len(payload)
    payload[place : place + len(raw)] = raw
    with pytest.raises(WireError, match="sign: got"):
        Sign().decode(bytes(payload), wire)
