"""Golomb–Rice codes of rising indices: an oracle of text bits, sizes against entropy, hostile bytes."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kilotune.codec import WireError
from kilotune.codec import _golomb as golomb
from kilotune.core.rng import stream


def text(indices: list[int], b: int) -> bytes:
    """The bits as the docstring says them, one gap after the other."""
    gaps = [here - before - 1 for before, here in zip([-1, *indices], indices, strict=False)]
    bits = "".join(format(g % 2**b, f"0{b}b") if b else "" for g in gaps)
    bits += "".join("0" * (g >> b) + "1" for g in gaps)
    return bytes(int(bits[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(bits), 8))


def places(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.sort(stream(seed, "places", n, k).choice(n, k, replace=False))


@pytest.mark.parametrize(
    "indices", [[], [0], [1000], [0, 1, 2, 3], [7, 8, 500], list(range(0, 999, 9)), [0, 2**33], list(range(3, 300))]
)
def test_bits_are_those_of_the_plain_definition_and_the_shortest(indices: list[int]) -> None:
    """Kills: low bits in the wrong order; unary of the index instead of the gap; a parameter one off the best."""
    b, raw = golomb.encode(np.array(indices, np.int64))
    n = indices[-1] + 1 if indices else 0
    assert raw == text(indices, b)
    assert golomb.decode("x", raw, b, len(indices), n).tolist() == indices
    if n < 1 << 20:
        assert len(raw) == min(len(text(indices, other)) for other in range(20))
    assert len(raw) <= golomb.most_bytes(n, len(indices))


@pytest.mark.parametrize("density", [0.5, 0.2, 0.05, 0.01])
def test_random_places_cost_little_more_than_their_entropy(density: float) -> None:
    """Kills: gaps coded with one parameter for all densities. Rice codes of geometric gaps stay within 4 % of the
    entropy at any density up to 1/2 (Golomb's bound), and the bound that is predicted within 15 %."""
    n = 200_000
    k = round(density * n)
    b, raw = golomb.encode(places(n, k))
    entropy = -n * (density * math.log2(density) + (1 - density) * math.log2(1 - density)) / 8
    assert entropy * 0.99 < len(raw) < entropy * 1.04
    assert len(raw) <= golomb.most_bytes(n, k) < entropy * 1.15
    assert golomb.decode("x", raw, b, k, n).tobytes() == places(n, k).tobytes()


def test_the_bound_holds_for_every_choice_of_places() -> None:
    """Kills: a bound for even gaps only. All 2^9 choices."""
    n = 9
    for chosen in range(1 << n):
        indices = np.flatnonzero([(chosen >> i) & 1 for i in range(n)])
        _, raw = golomb.encode(indices)
        assert all(len(raw) <= golomb.most_bytes(n, k) for k in range(indices.size, n + 1))


@pytest.mark.parametrize("n", range(1, 20))
def test_a_place_beyond_the_last_is_refused(n: int) -> None:
    """Kills: a write behind the end of a vector, for payloads as short as honest ones."""
    b, raw = golomb.encode(np.array([n - 1]))
    assert golomb.decode("x", raw, b, 1, n).tolist() == [n - 1]
    with pytest.raises(WireError, match="x: got"):
        golomb.decode("x", raw, b, 1, n - 1)


def test_the_example_of_the_page_on_the_wire() -> None:
    """Kills: a page that says other bits than the code writes."""
    assert golomb.encode(np.array([3, 4, 12])) == (1, bytes.fromhex("ac40"))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(raw=st.binary(max_size=30), b=st.integers(0, 255), k=st.integers(0, 300), n=st.integers(0, 400))
def test_any_bytes_are_refused_or_are_what_encode_makes_for_their_parameter(raw: bytes, b: int, k: int, n: int) -> None:
    """Kills: places beyond the tensor; bits behind the last place; an exception of NumPy for hostile lengths."""
    try:
        indices = golomb.decode("x", raw, b, k, n)
    except WireError:
        return
    assert indices.size == k
    assert (np.diff(indices) > 0).all()
    assert not k or (indices[0] >= 0 and indices[-1] < n)
    assert text(indices.tolist(), b) == raw
