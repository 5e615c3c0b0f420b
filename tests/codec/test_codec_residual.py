"""Residual: nothing is lost over rounds, with any codec inside; what carries over and what does not."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from kilotune.codec import TensorUpdate, WireContext
from kilotune.codec.residual import Residual
from kilotune.core.rng import stream

SHAPES = {"b": (70,), "a": (5, 40)}
INSIDE = [
    {"name": "topk", "density": 0.05},
    {"name": "topk", "density": 0.1, "values": {"name": "coefficients", "error_feedback": False}},
    {"name": "randomk", "density": 0.1, "unbiased": False},
    {"name": "sign"},
    {"name": "sign", "scale": "rms", "block": 16},
    {"name": "quantized", "bits": 2, "rounding": "nearest"},
    {"name": "quantized", "grid": "powers", "block": 64},
    {"name": "ternary", "density": 0.1, "scale": "mean", "scope": "tensor"},
    {"name": "dense"},
]


def context(number: int, root: int = 3, size: int = 0) -> WireContext:
    return WireContext(number, root, SHAPES, size, stream(number, "codec"))


def update(seed: int) -> TensorUpdate:
    rng = stream(seed, "residual")
    return TensorUpdate({n: torch.from_numpy(rng.normal(size=s).astype(np.float32)) for n, s in SHAPES.items()})


@pytest.mark.parametrize("inside", INSIDE, ids=str)
def test_what_was_decoded_and_what_is_left_make_up_all_that_was_given(inside: dict) -> None:
    """Kills: a residual of the update without what it carried; one that is added twice, or never.

    Bound: each of 40 rounds rounds three float32 numbers of the size of the largest.
    """
    codec, state = Residual(codec=inside), {}
    given, got = ({n: torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()} for _ in range(2))
    largest = 0.0
    for number in range(1, 41):
        payload = codec.encode(update(number), context(number), state)
        for name, tensor in codec.decode(payload, context(number)).tensors.items():
            given[name] += update(number).tensors[name].double()
            got[name] += tensor.double()
            largest = max(largest, float(tensor.abs().max()), float(state[f"residual/{name}"].abs().max()))
    for name in SHAPES:
        left = state[f"residual/{name}"].double()
        assert (got[name] + left - given[name]).abs().max() <= 40 * 3 * largest * 2.0**-24


def test_the_payload_is_that_of_the_codec_inside() -> None:
    """Kills: bytes that the wrapper adds; a first round that is already corrected."""
    codec = Residual(codec={"name": "sign"})
    assert codec.encode(update(1), context(1), {}) == codec.codec.encode(update(1), context(1), {})


def test_without_a_basis_residuals_outlive_the_round_and_its_root() -> None:
    """Kills: residuals of weights dropped because every round has a root of its own."""
    codec, state = Residual(), {}
    codec.encode(update(1), context(1, root=1), state)
    assert codec.carried(state, root=2) == state
    assert sorted(state) == ["residual/a", "residual/b"]


def test_over_a_basis_residuals_end_with_their_root() -> None:
    """Kills: numbers added to other directions after the noise was refreshed."""
    codec, state = Residual(), {}
    codec.encode(update(1), context(1, root=2**64 - 1, size=256), state)
    assert codec.carried(state, root=2**64 - 1) is state
    assert codec.carried(state, root=8) == {}
    fresh = codec.encode(update(2), context(2, root=8, size=256), {})
    assert codec.encode(update(2), context(2, root=8, size=256), state) == fresh


@pytest.mark.parametrize(
    ("inside", "why"),
    [
        ("seed_scalar", "which seed_scalar does not; use topk"),
        ("projection", "which projection does not; use topk"),
        ("coefficients", "error_feedback: false"),
        ("residual", "no residual inside"),
        ("randomk", "unbiased: false"),
        ("ternary", "scale: mean"),
        ({"name": "quantized", "bits": 2}, "rounding: nearest"),
    ],
)
def test_codecs_that_cannot_be_corrected_are_refused_with_the_way_out(inside: object, why: str) -> None:
    """Kills: errors that grow until the run diverges; two error feedbacks, one inside the other."""
    with pytest.raises(ValidationError, match=why):
        Residual(codec=inside)
