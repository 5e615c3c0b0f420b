"""Random-k: public places, sizes, the mean over choices."""

import numpy as np
import pytest
import torch

from kilotune.codec import TensorUpdate, WireContext
from kilotune.codec._vector import largest
from kilotune.codec.dense import Dense
from kilotune.codec.randomk import RandomK
from kilotune.core.rng import stream

N = 400


def context(number: int = 1, root: int = 5, sender: int = 0) -> WireContext:
    return WireContext(number, root, {"x": (N,)}, 0, stream(sender, "codec"))


def vector(seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(stream(seed, "randomk").normal(size=N).astype(np.float32))


def through(codec: RandomK, x: torch.Tensor, wire: WireContext) -> torch.Tensor:
    return codec.decode(codec.encode(TensorUpdate({"x": x}), wire, {}), wire).tensors["x"]


def test_only_values_travel() -> None:
    """Kills: places on the wire: 8 bytes of own header, 17 of the values' and 2 a number."""
    payload = RandomK(density=0.1).encode(TensorUpdate({"x": vector()}), context(), {})
    assert len(payload) == 8 + 17 + 2 * 40


def test_all_senders_of_a_round_choose_the_same_places_and_every_round_others() -> None:
    """Kills: places from the sender's private numbers; the same places in all rounds under one root."""
    codec = RandomK(density=0.1)
    assert codec.places(context(sender=1)).tolist() == codec.places(context(sender=2)).tolist()
    rounds = {tuple(codec.places(context(number)).tolist()) for number in range(1, 6)}
    assert len(rounds) == 5
    assert codec.places(context(root=6)).tolist() not in [list(places) for places in rounds]


@pytest.mark.parametrize("unbiased", [True, False])
def test_kept_numbers_arrive_and_are_scaled_only_where_asked(unbiased: bool) -> None:
    """Kills: n / k the wrong way round; numbers put back in other places."""
    codec, x = RandomK(density=0.125, unbiased=unbiased, values=Dense(dtype="fp32")), vector()
    got = through(codec, x, context())
    places = torch.from_numpy(codec.places(context()))
    expected = torch.zeros(N)
    expected[places] = x[places] * (8.0 if unbiased else 1.0)
    assert torch.equal(got, expected)


def test_the_mean_over_rounds_is_the_update() -> None:
    """E[decoded] = x. Kills: places that prefer one end. 600 rounds, each number within 5 standard errors."""
    codec, x, total, rounds = RandomK(density=0.25, values=Dense(dtype="fp32")), vector(), torch.zeros(N), 600
    for number in range(rounds):
        total += through(codec, x, context(number))
    error = (3.0 / rounds) ** 0.5 * x.abs()  # variance of a number: x² (1 / density - 1)
    assert ((total / rounds - x).abs() <= 5 * error + 1e-4).all()


def test_the_first_of_equal_numbers_win() -> None:
    """Kills: a choice by a sort that may order ties as it likes."""
    assert largest(np.array([2.0, 1.0, 2.0, 1.0, 1.0]), 4).tolist() == [0, 1, 2, 3]
    assert largest(np.array([1.0, 2.0]), 5).tolist() == [0, 1]
