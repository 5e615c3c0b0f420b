"""Dense payloads: golden bytes, rounding, range."""

import zlib

import numpy as np
import pytest
import torch

from kilotune.codec import TensorUpdate, WireContext, WireError
from kilotune.codec.dense import Dense

GOLDEN = {
    "fp32": "444e533100 6d009101 0300000000000000 0000803f 000000c0 0000003f",
    "fp16": "444e533101 6d009101 0300000000000000 003c 00c0 0038",
    "bf16": "444e533102 6d009101 0300000000000000 803f 00c0 003f",
}


def context(**shapes: tuple[int, ...]) -> WireContext:
    return WireContext(1, 0, shapes)


@pytest.mark.parametrize("dtype", GOLDEN)
def test_golden_bytes(dtype: str) -> None:
    """Kills: a change of the wire format without a new version digit; tensors in model order."""
    update = TensorUpdate({"b": torch.tensor([0.5]), "a": torch.tensor([[1.0, -2.0]])})
    wire = context(b=(1,), a=(1, 2))
    payload = bytes.fromhex(GOLDEN[dtype])
    assert Dense(dtype=dtype).encode(update, wire, {}) == payload
    decoded = Dense(dtype=dtype).decode(payload, wire).tensors
    assert all(torch.equal(decoded[name], tensor) for name, tensor in update.tensors.items())


def test_the_table_checksum_is_the_documented_crc() -> None:
    """Kills: a checksum that only our own function can reproduce."""
    first = "01000000 61 02000000 0100000000000000 0200000000000000"  # name length, "a", axes, 1, 2
    second = "01000000 62 01000000 0100000000000000"  # name length, "b", axes, 1
    table = bytes.fromhex(first + second)
    assert zlib.crc32(table).to_bytes(4, "little") == bytes.fromhex(GOLDEN["fp32"])[5:9]


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 0.0), ("fp16", 2.0**-11), ("bf16", 2.0**-8)])
def test_rounding_stays_within_half_a_unit_in_the_last_place(dtype: str, bound: float) -> None:
    """Kills: truncation instead of rounding; bfloat16 bits read as float16. Bound: 2^-(mantissa bits + 1)."""
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    wire = context(x=(4000,))
    got = Dense(dtype=dtype).decode(Dense(dtype=dtype).encode(TensorUpdate({"x": x}), wire, {}), wire).tensors["x"]
    assert ((got - x).abs() <= bound * x.abs()).all()


def test_numbers_outside_fp16_are_refused_with_the_way_out() -> None:
    """Kills: infinity on the wire because a finite number was too large."""
    with pytest.raises(WireError, match=r"7e\+04 .* fp16.*codec.dtype: fp32"):
        Dense(dtype="fp16").encode(TensorUpdate({"x": torch.tensor([7e4])}), context(x=(1,)), {})


def test_a_payload_of_another_element_type_is_refused() -> None:
    """Kills: fp16 payloads read as bf16, which have the same length."""
    wire = context(x=(1,))
    payload = Dense(dtype="fp16").encode(TensorUpdate({"x": torch.ones(1)}), wire, {})
    with pytest.raises(WireError, match="dtype code 1, expected 2"):
        Dense(dtype="bf16").decode(payload, wire)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_received_numbers_that_are_not_finite_are_refused(dtype: str, bad: float) -> None:
    """Kills: a check on the sending side only, which a malicious client skips."""
    wire = context(x=(3,))
    payload = bytearray(Dense(dtype=dtype).encode(TensorUpdate({"x": torch.ones(3)}), wire, {}))
    width = {"fp32": 4, "fp16": 2, "bf16": 2}[dtype]
    raw = np.array([bad], "<f2" if dtype == "fp16" else "<f4").tobytes()[-width:]
    payload[-width:] = raw
    with pytest.raises(WireError, match="NaN or infinity in tensor 'x'"):
        Dense(dtype=dtype).decode(bytes(payload), wire)


def test_a_huge_count_in_the_header_is_refused_before_memory_is_taken() -> None:
    """Kills: allocating what a header claims."""
    wire = context(x=(1,))
    payload = bytearray(Dense(dtype="fp32").encode(TensorUpdate({"x": torch.ones(1)}), wire, {}))
    payload[9:17] = b"\xff" * 8
    with pytest.raises(WireError, match="element count 18446744073709551615, expected 1"):
        Dense(dtype="fp32").decode(bytes(payload), wire)
