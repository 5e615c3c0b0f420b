"""One byte for a step, and the list in which every peer finds its own."""

import math
import struct
from dataclasses import replace

import numpy as np
import pytest

from kilotune.codec import SeedUpdate, WireContext, WireError
from kilotune.codec.one_byte import OneByte
from kilotune.codec.peers import Peers
from kilotune.core.rng import stream

SIZE = 4096
EVERY_BYTE = np.array([code for code in range(256) if code != 0x80], np.uint8)


def probes(sender: int) -> np.ndarray:
    return stream(sender, "probes").integers(0, SIZE, 20_000)


def context(sender: int = 7, draws: int = 0) -> WireContext:
    return WireContext(3, 1, {"coords": (SIZE,)}, SIZE, stream(draws, "rounding"), sender, probes)


def steps(values: np.ndarray, sender: int = 7) -> SeedUpdate:
    return SeedUpdate(probes(sender)[: values.size], values.astype(np.float32))


def own_decoding(codes: np.ndarray) -> np.ndarray:
    """The law, written down a second time."""
    sizes = [0.0 if code % 128 == 0 else math.exp((code % 128 - 64) / 8) for code in codes.tolist()]
    return np.array([-size if code >= 128 else size for code, size in zip(codes.tolist(), sizes, strict=True)])


def payload(codes: np.ndarray) -> bytes:
    return b"ONB1" + struct.pack("<H", codes.size) + codes.tobytes()


def test_every_byte_decodes_to_its_power_of_e_and_is_what_that_number_encodes_to():
    """Kills: another base, middle or sign bit; a level that moves when it is encoded again."""
    codec = OneByte(unit=0.5, rounding="nearest")
    found = codec.decode(payload(EVERY_BYTE), context())
    assert np.allclose(found.coefs, 0.5 * own_decoding(EVERY_BYTE), rtol=1e-6, atol=0)
    assert np.array_equal(found.indices, probes(7)[:255])
    assert found.senders is not None
    assert set(found.senders.tolist()) == {7}
    assert codec.encode(found, context(), {}) == payload(EVERY_BYTE)


def test_rounding_to_the_nearest_is_off_by_at_most_six_and_a_half_percent_from_a_thousandth_to_two_thousand():
    """Kills: rounding down; eight bits of which one is lost; a range that ends early."""
    values = np.geomspace(1e-3, 2e3, 4001) * np.where(np.arange(4001) % 2, -1, 1)
    codec = OneByte(rounding="nearest")
    sent = codec.decode(codec.encode(steps(values), context(), {}), context()).coefs
    assert np.abs(sent / values.astype(np.float32) - 1).max() <= 0.065


@pytest.mark.parametrize("value", [1e-4, -0.037, 1.03, 800.0])
def test_the_mean_of_many_stochastic_roundings_is_the_number(value: float):
    """Also of a number below the smallest magnitude. Kills: shares of the logarithm instead of the number."""
    codec = OneByte()
    sent = codec.decode(codec.encode(steps(np.full(20_000, value)), context(), {}), context()).coefs
    tolerance = 0.05 if abs(value) < 3e-4 else 0.01  # one in four draws
    assert abs(sent.astype(np.float64).mean() / value - 1) <= tolerance


def test_a_gradient_takes_one_byte_and_six_around_it():
    """Kills: directions on the wire; a prediction that is not the length."""
    codec = OneByte()
    one = codec.encode(steps(np.array([2.0])), context(), {})
    assert len(one) == codec.predict_bytes({}, 1) == 7
    assert len(codec.encode(steps(np.ones(30)), context(), {})) == 36


def test_steps_without_a_slope_are_zeros_in_their_place():
    """Kills: bytes that move up when a step left none, so that they count along other directions."""
    whole = steps(np.arange(1.0, 6.0))
    some = SeedUpdate(whole.indices[[1, 4]], whole.coefs[[1, 4]])
    found = OneByte(rounding="nearest").decode(OneByte().encode(some, context(), {}), context())
    assert np.array_equal(found.indices, whole.indices)
    assert (found.coefs == 0).tolist() == [True, False, True, True, False]


def test_a_direction_that_the_sender_does_not_probe_is_not_sent():
    """Kills: a byte that everybody else counts along another direction."""
    few = replace(context(7), probes=lambda sender: probes(sender)[:3])
    for foreign in (steps(np.ones(3), sender=8), steps(np.ones(4), sender=7)):
        with pytest.raises(WireError, match="does not probe"):
            OneByte().encode(foreign, few, {})


@pytest.mark.parametrize(
    ("raw", "wrong"),
    [
        (payload(np.array([5, 0x80], np.uint8)), "zero with a sign"),
        (b"ONB1" + struct.pack("<H", 20_001) + bytes(20_001), "expected at most 20000"),
        (payload(np.ones(2, np.uint8))[:-1], "length"),
        (b"SDS1" + payload(np.ones(2, np.uint8))[4:], "magic"),
    ],
)
def test_payloads_no_peer_can_have_sent_are_refused(raw: bytes, wrong: str):
    """Kills: a second zero; more steps than the recipe has; cut or foreign payloads."""
    with pytest.raises(WireError, match=wrong):
        OneByte().decode(raw, context())


# -- the list ---------------------------------------------------------------------------------------------------------

SENT = {90: [3, 200, 70], 5: [130], 4_000_000_000: [0, 64]}
LIST = b"PRS1" + struct.pack("<HI3I", 3, 3, 5, 90, 4_000_000_000) + bytes([130, 0, 0, 3, 200, 70, 0, 64, 0])


def mean_of(sent: dict[int, list[int]], unit: float) -> SeedUpdate:
    parts = [OneByte(unit=unit).decode(payload(np.array(b, np.uint8)), context(peer)) for peer, b in sent.items()]
    indices, coefs = (np.concatenate([getattr(part, key) for part in parts]) for key in ("indices", "coefs"))
    senders = np.concatenate([part.senders for part in parts if part.senders is not None])
    return SeedUpdate(indices, coefs.astype(np.float64) / len(sent), senders=senders)


def test_the_list_holds_the_very_bytes_by_rising_peer():
    """Kills: bytes that change on the way; an order of arrival on the wire; padding before the steps."""
    assert Peers(unit=3e-4).encode(mean_of(SENT, 3e-4), context(), {}) == LIST


def test_the_payloads_are_those_of_the_wire_format():
    """docs/wire.md. Kills: any change of a header or of the law."""
    values = np.array([-1.0, 0.0, math.exp(3 / 8)])
    assert OneByte(rounding="nearest").encode(steps(values), context(), {}).hex() == "4f4e42310300c00043"
    assert LIST.hex() == "50525331030003000000050000005a00000000286bee82000003c846004000"


@pytest.mark.parametrize("count", [1, 3, 7, 100])
def test_no_byte_changes_however_many_peers_there_are(count: int):
    """Kills: a share of the mean that is not taken back exactly enough to find the byte again."""
    sent = {peer: EVERY_BYTE[peer % 5 :].tolist() for peer in range(count)}
    raw = Peers(unit=3e-4).encode(mean_of(sent, 3e-4), context(), {})
    body = np.frombuffer(raw, np.uint8)[10 + 4 * count :].reshape(count, -1)
    for peer, codes in sent.items():
        assert body[peer, : len(codes)].tolist() == codes


@pytest.mark.parametrize(("divide", "divisor"), [("count", 3.0), ("root", math.sqrt(3))])
def test_everybody_adds_the_bytes_along_each_peers_own_directions(divide: str, divisor: float):
    """Kills: one peer's directions for all; n and √n mixed up; zeros behind a peer's last step counted as moves."""
    found = Peers(unit=0.1, divide=divide).decode(LIST, context())
    effect, wanted = np.zeros(SIZE), np.zeros(SIZE)
    np.add.at(effect, found.indices, found.coefs)
    for peer, codes in SENT.items():
        np.add.at(wanted, probes(peer)[: len(codes)], 0.1 * own_decoding(np.array(codes)) / divisor)
    assert np.allclose(effect, wanted, rtol=1e-5, atol=0)


def test_a_peer_finds_its_bytes_or_is_left_out_and_knows_every_other_case():
    """Kills: comparing with someone else's row; padding that hides a byte; absence taken for a lie."""
    codec = Peers()
    for peer, codes in SENT.items():
        assert codec.repeats(LIST, payload(np.array(codes, np.uint8)), context(peer))
        for other in ([*codes[:-1], codes[-1] ^ 1], [*codes, 1], [9, *codes]):
            assert not codec.repeats(LIST, payload(np.array(other, np.uint8)), context(peer))
    assert codec.repeats(LIST, payload(np.array([1], np.uint8)), context(6))


@pytest.mark.parametrize(
    ("raw", "wrong"),
    [
        (b"PRS1" + struct.pack("<HI2I", 1, 2, 9, 9) + b"\1\1", "out of order"),
        (b"PRS1" + struct.pack("<HI2I", 1, 2, 9, 8) + b"\1\1", "out of order"),
        (b"PRS1" + struct.pack("<HII", 1, 1, 9) + b"\x80", "zero with a sign"),
        (b"PRS1" + struct.pack("<HII", 0, 1, 9), "without a step"),
        (b"PRS1" + struct.pack("<HI", 1, 2**32 - 1), "length"),
    ],
)
def test_lists_nobody_can_have_made_are_refused(raw: bytes, wrong: str):
    """Kills: a peer that counts twice; memory for a count that is not there."""
    with pytest.raises(WireError, match=wrong):
        Peers().decode(raw, context())
