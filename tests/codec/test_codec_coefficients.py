"""Coefficients: golden bytes, sizes, the bound of rounding, error feedback."""

import struct

import numpy as np
import pytest
import torch

from kilotune.codec import TensorUpdate, WireContext, WireError
from kilotune.codec._blocks import round_up_fp16
from kilotune.codec._loops import compiled, dequantize
from kilotune.codec.coefficients import HEADER, NUMBERS, Coefficients
from kilotune.core.rng import stream

M = 4096


def context(size: int = M, root: int = 7) -> WireContext:
    return WireContext(1, root, {"coords": (size,)})


def coords(seed: int, size: int = M, spread: int = 3) -> torch.Tensor:
    rng = stream(seed, "coords")
    return torch.from_numpy((rng.normal(size=size) * 10.0 ** rng.integers(-spread, spread, size)).astype(np.float32))


def through(codec: Coefficients, x: torch.Tensor, wire: WireContext, state: dict) -> torch.Tensor:
    return codec.decode(codec.encode(TensorUpdate({"coords": x}), wire, state), wire).tensors["coords"]


def test_golden_bytes() -> None:
    """Kills: any change of the wire format without a new version digit; rounding half away from zero."""
    x = torch.tensor([127.0, 2.5, 3.5, -127.0, 0.0, 0.0, 254.0])
    payload = Coefficients(block=2).encode(TensorUpdate({"coords": x}), context(7), {})
    # largest step 2 = 0.5 * 2^2, so e = 2 - 15 and steps are stored times 2^13: 1, 1, 0 and 2
    head = b"COF1" + struct.pack("<BHhIIQ", 3, 2, -13, int.from_bytes(payload[9:13], "little"), 4, 7)
    assert payload[:25] == head
    assert payload.hex(" ") == (
        "43 4f 46 31 03 02 00 f3 ff 07 4e ac 78 04 00 00 00 07 00 00 00 00 00 00 00 "
        "00 70 00 70 00 00 00 74 7f 02 04 81 00 00 7f"
    )


def test_golden_bytes_of_four_bits() -> None:
    """Kills: halves of a byte the other way round; negative numbers without their sign."""
    x = torch.tensor([7.0, 2.5, 3.5, -7.0, 0.0, 0.0, 14.0])
    codec = Coefficients(dtype="int4", block=2)
    payload = codec.encode(TensorUpdate({"coords": x}), context(7), {})
    assert payload[4:9] == struct.pack("<BHh", 5, 2, -13)
    assert payload[25:].hex(" ") == "00 70 00 70 00 00 00 74 72 49 00 70"
    assert codec.decode(payload, context(7)).tensors["coords"].tolist() == [7, 2, 4, -7, 0, 0, 14]
    for last in (b"\x80", b"\x71"):  # -8, and bits behind the last number
        with pytest.raises(WireError):
            codec.decode(payload[:-1] + last, context(7))


@pytest.mark.parametrize(("dtype", "block", "size", "bound"), [("int4", 128, 8192, 4400), ("int8", 256, 8192, 8800)])
def test_the_default_coefficients_fit_the_budget(dtype: str, block: int, size: int, bound: int) -> None:
    """Kills: wide scales or headers that break the promise of 4.4 kB up and 8.8 kB down."""
    codec = Coefficients(dtype=dtype, block=block)
    payload = codec.encode(TensorUpdate({"coords": coords(0, size)}), context(size), {})
    assert len(payload) == codec.predict_bytes({"coords": size}, 0) <= bound


@pytest.mark.parametrize("factor", [1.0, 1e-38, 1e-44, 1e30])
@pytest.mark.parametrize("dtype", ["int4", "int8", "int16", "fp16"])
def test_rounding_stays_within_half_a_step_of_each_block(dtype: str, factor: float) -> None:
    """Kills: scales rounded down, so that the largest number is cut off; fp16 under- and overflow of scales.

    Bound: a step is at most its exact value times 1 + 2^-10, or one smallest fp16 number above it; the final
    float32 rounding adds half of its own unit. Numbers in fp16 are rounded to 11 bits or to the smallest fp16 number.
    """
    x = (coords(1).double() * factor).float().double()  # magnitudes over eight decades
    got = through(Coefficients(dtype=dtype, error_feedback=False), x.float(), context(), {}).double()
    peak = x.reshape(-1, 64).abs().amax(1, keepdim=True) / NUMBERS[dtype].limit
    step = (peak * (1 + 2.0**-10) + peak.max() * 2.0**-38).expand(-1, 64).reshape(-1)
    half = step / 2 if dtype != "fp16" else torch.maximum(x.abs() * 2.0**-11, step * 2.0**-25)
    assert ((got - x).abs() <= half + x.abs() * 2.0**-24 + 2.0**-150).all()


def test_zero_blocks_and_zero_updates_stay_zero() -> None:
    """Kills: 0 / 0 in empty blocks; a log of zero for the exponent."""
    x = torch.zeros(M)
    assert torch.equal(through(Coefficients(), x, context(), {}), x)
    x[70] = 3.0
    got = through(Coefficients(), x, context(), {})
    assert torch.equal(got != 0, x != 0)


def test_scales_are_rounded_up() -> None:
    """Kills: nearest rounding, which lets the largest number of a block leave the integer range."""
    values = np.abs(stream(0, "scales").normal(size=20000)) * 10.0 ** stream(1, "scales").integers(-9, 4, 20000)
    rounded = round_up_fp16(values).astype(np.float64)
    assert (rounded >= values).all()
    assert (np.nextafter(rounded.astype(np.float16), np.float16(0)).astype(np.float64) < values).all()


@pytest.mark.parametrize("dtype", ["int4", "int8", "int16", "fp16"])
def test_error_feedback_loses_nothing_under_one_root(dtype: str) -> None:
    """Kills: a residual that is not added, added twice, or taken from the update without the old residual.

    Bound: each round may round the stored residual (at most half a step) and the decoded number to float32.
    """
    codec, state = Coefficients(dtype=dtype), {}
    sent, decoded = torch.zeros(M, dtype=torch.float64), torch.zeros(M, dtype=torch.float64)
    for step in range(20):
        x = coords(step, spread=1)
        sent += x.double()
        decoded += through(codec, x, context(), state).double()
    residual = state["residual/coords"].double()
    assert (sent - decoded - residual).abs().max() <= 20 * 2.0**-24 * residual.abs().max()
    assert (
        residual.abs().max() <= 0.51 * 1.01 * 100 / NUMBERS[dtype if dtype == "int4" else "int8"].limit
    )  # half a step of the largest block peak


def test_a_residual_of_another_root_is_dropped() -> None:
    """Kills: adding numbers that belong to other directions after the noise was refreshed."""
    state: dict[str, torch.Tensor] = {}
    codec = Coefficients()
    through(codec, coords(0), context(root=2**64 - 1), state)
    assert int(state["residual_root"]) == -1
    assert torch.equal(through(codec, coords(1), context(root=8), state), through(codec, coords(1), context(), {}))
    assert int(state["residual_root"]) == 8


def test_without_error_feedback_nothing_is_remembered() -> None:
    """Kills: state that grows although it was switched off."""
    state: dict[str, torch.Tensor] = {}
    through(Coefficients(error_feedback=False), coords(0), context(), state)
    assert state == {}


def test_blocks_restart_at_each_tensor() -> None:
    """Kills: one large tensor that drowns its small neighbour in a shared block."""
    shapes = {"big": (10,), "small": (10,)}
    wire = WireContext(1, 0, shapes)
    update = TensorUpdate({"big": coords(0, 10) * 1e6, "small": coords(1, 10, 1)})
    small = Coefficients().decode(Coefficients().encode(update, wire, {}), wire).tensors["small"]
    alone = through(Coefficients(), update.tensors["small"], context(10), {})
    assert (small - alone).abs().max() <= alone.abs().max() / 127 / 100


@pytest.mark.parametrize(("offset", "raw"), [(7, b"\xff\x7f"), (25, b"\x00\xfc"), (25, b"\x00\xbc"), (-1, b"\x80")])
def test_hostile_scales_and_numbers_are_refused(offset: int, raw: bytes) -> None:
    """Kills: an exponent, infinite or negative step, or -128 taken as it comes."""
    payload = bytearray(Coefficients().encode(TensorUpdate({"coords": coords(0)}), context(), {}))
    place = offset % len(payload)
    payload[place : place + len(raw)] = raw
    with pytest.raises(WireError, match="coefficients: got"):
        Coefficients().decode(bytes(payload), context())


def test_the_header_is_25_bytes() -> None:
    """Kills: native padding of the struct."""
    assert HEADER.size == 25


@pytest.mark.parametrize("dtype", ["<i1", "<i2", "<f4"])
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 300])
def test_the_compiled_loop_equals_the_plain_one(size: int, dtype: str) -> None:
    """Kills: a last block that is cut off or read beyond; products in float32; a bad number that passes."""
    rng = stream(size, "loop")
    numbers, steps = rng.integers(-127, 128, size).astype(dtype), rng.random(-(-size // 64)) * 1e-3
    plain, quick = np.zeros(size, np.float32), np.zeros(size, np.float32)
    assert dequantize(numbers, steps, 64, 127, plain) == compiled()(numbers, steps, 64, 127, quick) is True
    assert plain.tobytes() == quick.tobytes()
    assert np.array_equal(quick, (numbers * np.repeat(steps, 64)[:size]).astype(np.float32))
    if size:
        assert not compiled()(np.full_like(numbers, -128 if dtype == "<i1" else 200), steps, 64, 127, quick)
        assert not compiled()(numbers * 0 + 1, steps * 0 + 1e39, 64, 127, quick)
