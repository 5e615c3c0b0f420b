"""Ternary: three values, bytes against entropy, scales, signs."""

import math

import numpy as np
import pytest
import torch

from kilotune.codec import TensorUpdate, WireContext, WireError
from kilotune.codec.ternary import Ternary
from kilotune.core.rng import stream

SHAPES = {"a": (60, 100), "b": (4000,)}
WIRE = WireContext(1, 0, SHAPES)


def update(seed: int = 0) -> TensorUpdate:
    rng = stream(seed, "ternary")
    return TensorUpdate({n: torch.from_numpy(rng.normal(size=s).astype(np.float32)) for n, s in SHAPES.items()})


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


def through(codec: Ternary, sent: TensorUpdate) -> dict[str, torch.Tensor]:
    return codec.decode(codec.encode(sent, WIRE, {}), WIRE).tensors


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5])
def test_three_values_remain_with_the_signs_of_the_largest(density: float) -> None:
    """Kills: the deviation of the kept numbers instead of all; a mask by value; a lost sign."""
    x, got = flat(update().tensors), flat(through(Ternary(density=density, alpha=2.0), update()))
    scale = float(np.float32(2.0 * x.double().numpy().std()))
    kept = x.abs().topk(round(density * x.numel())).indices
    expected = torch.zeros_like(x)
    expected[kept] = scale * x[kept].sign()
    assert torch.equal(got, expected)
    assert got.unique().numel() == 3


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.3, 0.5])
def test_bytes_are_within_five_percent_of_the_entropy(density: float) -> None:
    """Kills: a byte per sign; places as numbers. H(k) = -[(1-k) log2(1-k) + k log2(k/2)] bits a number."""
    n = 10_000
    payload = Ternary(density=density).encode(update(), WIRE, {})
    entropy = -n * ((1 - density) * math.log2(1 - density) + density * math.log2(density / 2)) / 8
    assert 0.98 * entropy < len(payload) - 17 - 4 < 1.05 * entropy
    assert len(payload) <= Ternary(density=density).predict_bytes({"a": 6000, "b": 4000}, 0) < 1.12 * entropy + 21


def test_decoding_and_encoding_again_changes_nothing_but_the_scale() -> None:
    """Kills: a support that grows or moves. With `mean` the scale stays too, bit for bit."""
    codec = Ternary(density=0.1, scale="mean")
    once = through(codec, update())
    twice = through(codec, TensorUpdate(once))
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_each_tensor_has_a_scale_of_its_own_where_that_is_asked_for() -> None:
    """Kills: one deviation for factors of different size; scales given to the wrong tensor."""
    sent = update()
    sent.tensors["b"] *= 1e-3
    got = through(Ternary(density=0.2, scope="tensor"), sent)
    for name, value in sent.tensors.items():
        scale = float(np.float32(value.double().numpy().std()))
        assert got[name].abs().unique().tolist() == [0.0, scale]
        assert int((got[name] != 0).sum()) == value.numel() // 5


def test_numbers_that_are_zero_are_not_sent_as_a_sign() -> None:
    """Kills: ±s for numbers that did not change."""
    sent = TensorUpdate({"a": torch.zeros(60, 100), "b": torch.zeros(4000)})
    assert not flat(through(Ternary(), sent)).any()
    sent.tensors["b"][7] = -1.0
    assert torch.nonzero(flat(through(Ternary(), sent))).reshape(-1).tolist() == [6007]


def test_the_mean_magnitude_is_that_of_the_kept() -> None:
    """Kills: the signed mean, which is near 0; the mean over all."""
    x, got = flat(update().tensors), flat(through(Ternary(density=0.1, scale="mean"), update()))
    assert float(got.max()) == float(np.float32(x.abs().topk(1000).values.double().mean()))


@pytest.mark.parametrize("raw", ["0000c07f", "0000807f", "000080bf"])
def test_hostile_scales_are_refused(raw: str) -> None:
    """Kills: NaN, infinity or turned signs for all numbers by one fact."""
    payload = Ternary().encode(update(), WIRE, {})[:-4] + bytes.fromhex(raw)
    with pytest.raises(WireError, match="ternary: got a scale"):
        Ternary().decode(payload, WIRE)
