"""Laws of every codec the registry finds."""

import re
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kilotune.codec import Codec, SeedUpdate, TensorUpdate, Update, WireContext, WireError
from kilotune.core.registry import find, names
from kilotune.core.rng import stream

SHAPES = {"w.b": (130,), "w.a": (7, 9), "scalar": ()}
SIZE = 300


def build(name: str) -> Codec:
    method = find("codec", name)
    return method(**method.example)


def speaker(name: str) -> str:
    """The codec whose magic starts the payload: itself, or what it wraps without a word of its own."""
    inside = build(name).bare.method_name()
    return inside if payload_of(name)[:4] == payload_of(inside)[:4] else name


def context() -> WireContext:
    return WireContext(1, 2**63 + 5, SHAPES, SIZE, stream(1, "codec"), probes=probes)


def probes(sender: int) -> np.ndarray:
    return stream(sender, "probes").integers(0, SIZE, 40)


@cache
def payload_of(name: str) -> bytes:
    return build(name).encode(update_for(build(name)), context(), {})


def update_for(codec: Codec, seed: int = 0) -> Update:
    rng = stream(seed, "update")
    if codec.takes == "seeds":
        return SeedUpdate(probes(0), rng.normal(size=40).astype(np.float32))
    return TensorUpdate({n: torch.from_numpy(np.asarray(rng.normal(size=s), np.float32)) for n, s in SHAPES.items()})


def numbers(update: Update) -> dict[str, np.ndarray]:
    if isinstance(update, TensorUpdate):
        return {name: tensor.numpy() for name, tensor in update.tensors.items()}
    parts = {"indices": update.indices, "coefs": update.coefs, "groups": update.groups}
    return {name: part for name, part in parts.items() if part is not None}


def assert_usable(update: Update) -> None:
    """What a receiver may rely on after decode."""
    for name, values in numbers(update).items():
        assert np.isfinite(values).all()
        assert values.dtype == (np.int64 if name in ("indices", "groups") else np.float32)
    if isinstance(update, TensorUpdate):
        assert {name: tuple(tensor.shape) for name, tensor in update.tensors.items()} == SHAPES
    else:
        assert update.indices.shape == update.coefs.shape
        assert ((update.indices >= 0) & (update.indices < SIZE)).all()


@pytest.mark.parametrize("name", names("codec"))
def test_payload_starts_with_three_letters_and_a_version(name: str) -> None:
    """Kills: a payload that cannot be told from another codec's; two codecs with one magic; a wrapper's own bytes."""
    magics = {speaker(other): payload_of(other)[:4] for other in names("codec")}
    assert re.fullmatch(rb"[A-Z]{3}[0-9]", magics[speaker(name)])
    assert list(magics.values()).count(magics[speaker(name)]) == 1


@pytest.mark.parametrize("name", names("codec"))
def test_decoding_gives_a_usable_update_and_leaves_the_input_alone(name: str) -> None:
    """Kills: wrong names, shapes or dtypes after decode; encode that scales or sorts the caller's arrays."""
    codec, update = build(name), update_for(build(name))
    assert_usable(codec.decode(codec.encode(update, context(), {}), context()))
    for key, values in numbers(update_for(codec)).items():
        assert np.array_equal(values, numbers(update)[key])


@pytest.mark.parametrize("name", names("codec"))
def test_equal_inputs_give_equal_bytes_in_any_tensor_order(name: str) -> None:
    """Kills: global random numbers; bytes that depend on the order of a dict."""
    codec, update = build(name), update_for(build(name))
    first = codec.encode(update, context(), {})
    if isinstance(update, TensorUpdate):
        update = TensorUpdate(dict(reversed(update.tensors.items())))
    assert codec.encode(update, context(), {}) == first


@pytest.mark.parametrize("name", names("codec"))
def test_prediction_bounds_the_payload(name: str) -> None:
    """Kills: a header or an index array forgotten in predict_bytes."""
    codec, update = build(name), update_for(build(name))
    payload = codec.encode(update, context(), {})
    sent = codec.decode(payload, context())
    num_pairs = sent.indices.size if isinstance(sent, SeedUpdate) else 0
    predicted = codec.predict_bytes({n: int(np.prod(s)) for n, s in SHAPES.items()}, num_pairs)
    assert len(payload) <= predicted
    assert not codec.exact or len(payload) == predicted


@pytest.mark.parametrize("name", names("codec"))
def test_state_is_kept_by_codecs_that_remember_and_by_no_other(name: str) -> None:
    """Kills: error feedback that is switched off and goes on; a wrapper around a codec with feedback of its own."""
    codec, state = build(name), dict[str, torch.Tensor]()
    codec.encode(update_for(codec), context(), state)
    assert bool(state) == codec.remembers


@pytest.mark.parametrize("name", [n for n in names("codec") if build(n).takes == "tensors" and not build(n).remembers])
def test_error_feedback_goes_around_codecs_whose_losses_stay_bounded_and_around_no_other(name: str) -> None:
    """The same update 60 times: what is left stays below ten of them.

    Kills: `bounded_loss` of a codec whose residual grows without end; pairs inside a residual.
    """
    codec, state = build(name), dict[str, torch.Tensor]()
    if not codec.bounded_loss or codec.gives & {"pairs", "any_rank"}:
        with pytest.raises(ValidationError, match="a codec"):
            find("codec", "residual")(codec=codec)
        return
    residual, update = find("codec", "residual")(codec=codec), update_for(codec)
    for number in range(1, 61):
        wire = WireContext(number, 9, SHAPES, 0, stream(number, "codec"))
        residual.encode(update, wire, state)
    given = np.concatenate([values.reshape(-1) for values in numbers(update).values()])
    left = np.concatenate([tensor.numpy().reshape(-1) for tensor in state.values()])
    assert np.linalg.norm(left) <= 10 * np.linalg.norm(given)


@pytest.mark.parametrize("name", names("codec"))
def test_every_cut_and_every_padding_is_refused(name: str) -> None:
    """Kills: reading what is there; ignoring what follows; struct.error or ValueError instead of WireError."""
    codec = build(name)
    payload = payload_of(name)
    for length in range(len(payload)):
        with pytest.raises(WireError, match=speaker(name)):
            codec.decode(payload[:length], context())
    with pytest.raises(WireError, match=speaker(name)):
        codec.decode(payload + b"\0", context())


@pytest.mark.parametrize("name", names("codec"))
def test_payloads_of_other_codecs_are_refused(name: str) -> None:
    """Kills: a magic that is written but not read."""
    codec = build(name)
    for other in {other for other in names("codec") if speaker(other) != speaker(name)}:
        with pytest.raises(WireError, match="magic"):
            codec.decode(payload_of(other), context())


@pytest.mark.parametrize("name", [name for name in names("codec") if build(name).takes == "tensors"])
def test_a_payload_for_another_tensor_table_is_refused(name: str) -> None:
    """Kills: tensors of another model with the same number of elements accepted in silence."""
    codec = build(name)
    payload = payload_of(name)
    for shapes in ({**SHAPES, "w.a": (9, 7)}, {"x.b" if n == "w.b" else n: s for n, s in SHAPES.items()}):
        with pytest.raises(WireError, match="table"):
            codec.decode(payload, WireContext(1, 2**63 + 5, shapes, SIZE))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", names("codec"))
def test_numbers_that_are_not_finite_are_not_sent(name: str, bad: float) -> None:
    """Kills: a diverged client that poisons the mean of all."""
    codec, update = build(name), update_for(build(name))
    state: dict[str, torch.Tensor] = {}
    numbers(update)["coefs" if codec.takes == "seeds" else "w.b"][3] = bad
    with pytest.raises(WireError, match="NaN or infinity"):
        codec.encode(update, context(), state)
    assert state == {}


def mutate(payload: bytes, flips: list[tuple[int, int]], length: int | None) -> bytes:
    raw = bytearray(payload)
    for place, value in flips:
        raw[place % len(raw)] = value
    return bytes(raw if length is None else raw[:length])


@pytest.mark.parametrize("name", names("codec"))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_altered_payloads_are_refused_or_harmless(name: str, data: Any) -> None:
    """Kills: any exception but WireError from hostile bytes; NaN or foreign directions let through."""
    codec, payload = build(name), payload_of(name)
    place = st.one_of(st.integers(0, 40), st.integers(0, len(payload) - 1))  # headers more often than numbers
    flips = data.draw(st.lists(st.tuples(place, st.integers(0, 255)), max_size=6))
    length = data.draw(st.one_of(st.none(), st.integers(0, len(payload))))
    try:
        update = codec.decode(mutate(payload, flips, length), context())
    except WireError:
        return
    assert_usable(update)


@pytest.mark.parametrize("name", names("codec"))
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(tail=st.binary(max_size=80))
def test_random_bytes_behind_the_right_magic_are_refused_or_harmless(name: str, tail: bytes) -> None:
    """Kills: allocation or slicing by an unchecked count."""
    codec, magic = build(name), payload_of(name)[:4]
    try:
        update = codec.decode(magic + tail, context())
    except WireError:
        return
    assert_usable(update)
