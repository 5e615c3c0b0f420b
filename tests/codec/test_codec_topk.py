"""Top-k: golden bytes, which numbers travel, real bytes against bitmap and list of places."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from kilotune.codec import TensorUpdate, WireContext, WireError
from kilotune.codec._frame import table_checksum
from kilotune.codec.dense import Dense
from kilotune.codec.topk import TopK
from kilotune.core.rng import stream

SHAPES = {"b": (500,), "a": (30, 50)}


def context(**shapes: tuple[int, ...]) -> WireContext:
    return WireContext(1, 0, shapes)


def update(seed: int = 0) -> TensorUpdate:
    rng = stream(seed, "topk")
    return TensorUpdate({n: torch.from_numpy(rng.normal(size=s).astype(np.float32)) for n, s in SHAPES.items()})


def through(codec: TopK, sent: TensorUpdate) -> dict[str, torch.Tensor]:
    wire = context(**SHAPES)
    return codec.decode(codec.encode(sent, wire, {}), wire).tensors


def test_golden_bytes() -> None:
    """Kills: a change of the wire format without a new version digit; places that do not count from the first name."""
    sent = TensorUpdate({"b": torch.tensor([3.0, 0.0]), "a": torch.tensor([[1.0, -4.0, 0.5]])})
    wire = context(b=(2,), a=(1, 3))
    payload = TopK(density=0.4).encode(sent, wire, {})
    # flat: 1 -4 0.5 3 0; places 1 and 3, gaps 1 and 1, b = 0: bits 01 01
    table, inner = (
        table_checksum(shapes).to_bytes(4, "little").hex() for shapes in ({"a": (1, 3), "b": (2,)}, {"values": (2,)})
    )
    expected = f"54504b31 {table} 02000000 00 01000000 50 444e5331 01 {inner} 0200000000000000 00c4 0042"
    assert payload == bytes.fromhex(expected)


def test_the_largest_of_all_tensors_travel_and_the_rest_is_zero() -> None:
    """Kills: the largest by value instead of magnitude; a share of each tensor where one mask over all is asked for."""
    sent = update()
    sent.tensors["b"] *= 0.1
    flat = torch.cat([sent.tensors["a"].reshape(-1), sent.tensors["b"]])
    got = through(TopK(density=0.1, values=Dense(dtype="fp32")), sent)
    joined = torch.cat([got["a"].reshape(-1), got["b"]])
    kept = set(flat.abs().topk(200).indices.tolist())
    assert set(torch.nonzero(joined).reshape(-1).tolist()) == kept
    assert torch.equal(joined[sorted(kept)], flat[sorted(kept)])


def test_each_tensor_keeps_its_share_where_that_is_asked_for() -> None:
    """Kills: `scope` without effect; a small tensor left out altogether."""
    sent = update()
    sent.tensors["b"] *= 1e-6
    got = through(TopK(density=0.1, scope="tensor", values=Dense(dtype="fp32")), sent)
    assert {name: int((value != 0).sum()) for name, value in got.items()} == {"a": 150, "b": 50}


def test_equal_magnitudes_are_taken_from_the_front_and_zeros_never() -> None:
    """Kills: ties that depend on a sort's inner order; k zeros on the wire when nothing changed."""
    sent = TensorUpdate({"a": torch.ones(30, 50), "b": -torch.ones(500)})
    got = through(TopK(density=0.5), sent)
    assert torch.equal(got["a"].reshape(-1), (torch.arange(1500) < 1000).float())
    assert not got["b"].any()
    none = TensorUpdate({name: torch.zeros(shape) for name, shape in SHAPES.items()})
    assert len(TopK().encode(none, context(**SHAPES), {})) == 17 + 17


def test_density_one_is_dense() -> None:
    """Kills: a number lost at the edges."""
    got = through(TopK(density=1.0, values=Dense(dtype="fp32")), update())
    assert all(torch.equal(got[name], value) for name, value in update().tensors.items())


@pytest.mark.parametrize("density", [0.5, 0.25, 1 / 16, 1 / 64])
def test_real_bytes_stay_below_bitmap_and_list_of_places(density: float) -> None:
    """Kills: places as 4-byte numbers; a code that is worse than a bitmap at high densities. n = 2000."""
    payload = TopK(density=density).encode(update(), context(**SHAPES), {})
    k = round(2000 * density)
    assert len(payload) <= min(2000 // 8, k * 11 // 8 + 1) + 2 * k + 17 + 17


def test_numbers_may_travel_through_any_codec_that_remembers_nothing() -> None:
    """Kills: an inner codec that is ignored; error feedback between numbers of different places."""
    codec = TopK(density=0.1, values={"name": "quantized", "bits": 8, "rounding": "nearest"})
    exact, got = through(TopK(density=0.1, values=Dense(dtype="fp32")), update()), through(codec, update())
    peak = max(float(value.abs().max()) for value in exact.values())
    assert all((got[name] - exact[name]).abs().max() <= peak / 127 / 2 * 1.01 for name in got)
    for inner, why in (
        ("coefficients", "error_feedback: false"),
        ("seed_scalar", "use topk"),
        ("residual", "residual"),
    ):
        with pytest.raises(ValidationError, match=why):
            TopK(values=inner)


def test_more_numbers_than_the_recipe_allows_are_refused() -> None:
    """Kills: a client that sends what it likes and is counted with those that keep to the density."""
    payload = TopK(density=0.26).encode(update(), context(**SHAPES), {})
    with pytest.raises(WireError, match=r"got 520 numbers .* expected at most 500"):
        TopK(density=0.25).decode(payload, context(**SHAPES))


@pytest.mark.parametrize(("offset", "raw"), [(8, b"\xff\xff\xff\xff"), (12, b"\x29"), (13, b"\xff\xff\xff\x7f")])
def test_hostile_counts_are_refused(offset: int, raw: bytes) -> None:
    """Kills: memory for as many numbers as a header claims."""
    payload = bytearray(TopK().encode(update(), context(**SHAPES), {}))
    payload[offset : offset + len(raw)] = raw
    with pytest.raises(WireError, match="topk: got"):
        TopK().decode(bytes(payload), context(**SHAPES))
