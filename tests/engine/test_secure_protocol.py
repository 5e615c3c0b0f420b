"""Secure aggregation without a network: sums, dropouts, refusals, and what the server can see."""

import itertools
import secrets

import numpy as np
import pytest

from kilotune.core.errors import FederationError, WireError
from kilotune.engine.secure import masks, shamir, wire
from kilotune.engine.secure.client import Session, Vault, seed_commitment
from kilotune.engine.secure.fixed import FRONT, FixedPoint
from kilotune.engine.secure.server import ServerSession, Stage

HEAD = "ab" * 32
NUMBERS = 50
GRID = FixedPoint(1.0, 32, 16, 8, "nearest")


def least(clients: int) -> int:
    return wire.threshold_of(0.6, clients)


def names_of(count: int) -> list[str]:
    return [f"c{n:02d}" for n in range(count)]


def updates_of(count: int) -> dict[str, np.ndarray]:
    """Numbers on both sides of the clip, and weights from 1."""
    rng = np.random.default_rng(7)
    return {name: rng.normal(0, 0.6, NUMBERS) for name in names_of(count)}


def words_of(name: str, values: np.ndarray, grid: FixedPoint = GRID) -> np.ndarray:
    return grid.words(values, 1 + int(name[1:]) % grid.max_weight, 0.5, np.random.default_rng(0))


class Room:
    """A server and its clients, driven stage by stage; what crosses is kept."""

    def __init__(self, count: int, number: int = 3, attempt: str = "first", numbers: int = NUMBERS) -> None:
        names = names_of(count)
        self.attempt, self.number = attempt, number
        ids = {name: wire.member_id(HEAD, name) for name in names}
        self.server = ServerSession(number, HEAD, attempt, ids, least(count), numbers, GRID)
        self.vaults = {name: Vault(ids[name], least, None) for name in names}
        self.vectors: dict[str, bytes] = {}

    def session(self, name: str) -> Session:
        return self.vaults[name].session(self.number, HEAD, self.attempt)

    def keys(self, away: set[str] = frozenset()) -> None:
        for name, vault in self.vaults.items():
            if name not in away:
                self.server.take_keys(name, vault.begin(self.number, HEAD, self.attempt))

    def shares(self, away: set[str] = frozenset()) -> None:
        table = self.server.table()
        for name in self.server.names(Stage.KEYS):
            if name not in away:
                self.server.take_shares(name, self.session(name).shares(self.server.threshold, table))

    def send(self, values: dict[str, np.ndarray], away: set[str] = frozenset()) -> None:
        for name in self.server.senders():
            if name not in away:
                self.vectors[name] = self.session(name).mask(self.server.mail(name), words_of(name, values[name]))
                self.server.take_vector(name, self.vectors[name])

    def reveal(self, away: set[str] = frozenset()) -> None:
        survivors = self.server.survivors()
        for name in self.server.names(Stage.VECTORS):
            if name not in away:
                self.server.take_revealed(name, self.session(name).reveal(survivors))


def plain_sum(values: dict[str, np.ndarray], names: list[str]) -> np.ndarray:
    """The oracle: integers of each client by hand, added as Python integers."""
    unit = 2**31 - 1
    room = unit // (GRID.max_clients * GRID.max_weight)
    scale = 2 ** (room.bit_length() - 1)
    total = [0] * NUMBERS
    for name in names:
        weight = 1 + int(name[1:]) % GRID.max_weight
        for i, x in enumerate(values[name]):
            total[i] += weight * round(min(max(float(x), -1.0), 1.0) * scale)
    return np.array(total) / scale


@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_opened_sum_is_the_integer_sum_of_the_clipped_updates(count):
    """Kills: masks that do not cancel; a sign taken twice; clipping after the sum; weights left out."""
    values, room = updates_of(count), Room(count)
    room.keys()
    room.shares()
    room.send(values)
    room.reveal()
    mean = GRID.mean(room.server.total(), count)
    names = names_of(count)
    assert mean.weight == sum(1 + int(name[1:]) % GRID.max_weight for name in names)
    assert np.array_equal(mean.numbers, plain_sum(values, names) / mean.weight)
    assert mean.loss == 0.5


@pytest.mark.parametrize("count", [3, 6, 10])
@pytest.mark.parametrize("stage", ["keys", "shares", "send", "reveal"])
def test_a_third_of_the_clients_may_drop_out_at_any_stage(count, stage):
    """Kills: pairwise masks of the dropped that stay in the sum; a threshold above what is left."""
    values, room = updates_of(count), Room(count)
    gone = set(names_of(count)[: count // 3])
    for step in ("keys", "shares", "send", "reveal"):
        arguments = (values,) if step == "send" else ()
        getattr(room, step)(*arguments, away=gone if step == stage else set())
    counted = sorted(set(values) - (gone if stage != "reveal" else set()))
    mean = GRID.mean(room.server.total(), len(counted))
    assert np.array_equal(mean.numbers, plain_sum(values, counted) / mean.weight)


def test_drop_outs_at_all_stages_together_are_survived():
    """Kills: places that shift when a client of an earlier stage is missing."""
    values, room = updates_of(10), Room(10)
    room.keys(away={"c00"})
    room.shares(away={"c04"})
    room.send(values, away={"c01", "c09"})
    room.reveal(away=set())
    counted = ["c02", "c03", "c05", "c06", "c07", "c08"]
    mean = GRID.mean(room.server.total(), 6)
    assert np.array_equal(mean.numbers, plain_sum(values, counted) / mean.weight)


@pytest.mark.parametrize("stage", ["keys", "shares", "send", "reveal"])
def test_below_the_threshold_the_round_ends_and_names_both_numbers(stage):
    """Kills: a sum opened with too few shares, or garbage taken for one."""
    values, room = updates_of(6), Room(6)
    gone = {"c00", "c02", "c05"}
    with pytest.raises(FederationError, match=r"round 3: 3 of 6 clients .*needs 4"):
        for step in ("keys", "shares", "send", "reveal"):
            getattr(room, step)(*((values,) if step == "send" else ()), away=gone if step == stage else set())
        room.server.total()


# -- what the server sees -------------------------------------------------------------------------------------


def chi_square(raw: bytes) -> float:
    counts = np.bincount(np.frombuffer(raw, np.uint8), minlength=256)
    expected = counts.sum() / 256
    return float(((counts - expected) ** 2 / expected).sum())


BOUND = 255 + 6 * (2 * 255) ** 0.5  # 6 sigma of chi-square with 255 degrees of freedom


def test_any_vectors_but_all_add_up_to_noise_even_without_the_own_masks(monkeypatch):
    """Kills: a pairwise mask used by one side only, or too short, or equal for two pairs; a sum of S - 1 that says
    something. The own masks, which the server learns in the end, are taken off first."""
    source = np.random.default_rng(11)
    monkeypatch.setattr(secrets, "token_bytes", lambda size=32: source.bytes(size))
    numbers, count = 20_000, 4
    room = Room(count, numbers=numbers)
    room.keys()
    room.shares()
    for name in room.server.senders():
        zeros = np.zeros(FRONT + numbers, GRID.dtype)
        room.vectors[name] = room.session(name).mask(room.server.mail(name), zeros)
    bare = {}
    for name, payload in room.vectors.items():
        assert chi_square(payload[4:]) < BOUND  # as it is sent
        bare[name] = np.frombuffer(payload[4:], GRID.dtype).copy()
        session = room.session(name)
        masks.add_mask(bare[name], masks.derive_key(session._seed, session._binding, b"own mask"), -1)
    for size in range(1, count):
        for group in itertools.combinations(bare, size):
            total = np.sum([bare[name] for name in group], axis=0, dtype=GRID.dtype)
            assert chi_square(total.tobytes()) < BOUND, group
    assert not np.sum(list(bare.values()), axis=0, dtype=GRID.dtype).any()


def test_the_same_update_looks_different_in_every_round_and_attempt():
    """Kills: keys that outlive a round; masks that follow from public facts."""
    values, seen = updates_of(3), []
    for number, attempt in ((3, "first"), (3, "second"), (4, "third")):
        room = Room(3, number, attempt)
        room.keys()
        room.shares()
        room.send(values)
        seen.append(np.frombuffer(room.vectors["c00"][4:], GRID.dtype))
    for one, other in itertools.combinations(seen, 2):
        assert (one != other).mean() > 0.95


# -- refusals ---------------------------------------------------------------------------------------------------


def ready(count: int = 5) -> tuple[Room, dict[str, np.ndarray]]:
    values, room = updates_of(count), Room(count)
    room.keys()
    room.shares()
    return room, values


@pytest.mark.parametrize("position", [0, 40, 81])
def test_an_altered_or_misdirected_share_is_refused(position):
    """Kills: encryption without authentication; a share accepted from another sender or for another recipient."""
    room, values = ready()
    room.server.senders()
    mail = bytearray(room.server.mail("c01"))
    mail[4 + 1 + position] ^= 1
    with pytest.raises(WireError, match=wire.member_id(HEAD, "c00").hex()):
        room.session("c01").mask(bytes(mail), words_of("c01", values["c01"]))
    with pytest.raises(WireError, match="was altered"):
        room.session("c01").mask(room.server.mail("c02"), words_of("c01", values["c01"]))
    assert room.session("c01").mask(room.server.mail("c01"), words_of("c01", values["c01"]))


def test_a_client_opens_one_sum_only_in_a_round():
    """Kills: both secrets of a client revealed by asking twice; a refusal that also refuses the honest repetition."""
    room, values = ready()
    room.send(values)
    session = room.session("c01")
    survivors = room.server.survivors()
    first = session.reveal(survivors)
    assert session.reveal(survivors) == first
    with pytest.raises(WireError, match="again with other words"):
        session.reveal(wire.SURVIVORS + wire.pack_set({0, 1, 2, 3}, 5))


def test_a_client_neither_masks_two_updates_alike_nor_for_two_sets():
    """Kills: two updates under one mask, whose difference is public."""
    room, values = ready()
    room.send(values)
    session, mail = room.session("c01"), room.server.mail("c01")
    again = words_of("c01", values["c01"])
    assert session.mask(mail, again) == room.vectors["c01"]
    with pytest.raises(WireError, match="again with other words"):
        session.mask(mail, words_of("c01", values["c02"]))


@pytest.mark.parametrize(
    ("places", "why"),
    [({0, 2, 3, 4}, "this client among"), ({0, 1}, "at least 3"), ({0, 1, 2, 3, 4, 5}, "beyond the 5")],
)
def test_survivors_that_cannot_be_are_refused(places, why):
    """Kills: a client that helps to open a sum of two, or one it is no part of."""
    room, values = ready()
    room.send(values)
    with pytest.raises(WireError, match=why):
        room.session("c01").reveal(wire.SURVIVORS + wire.pack_set(places, 5))


def test_the_stages_come_in_order_and_secrets_die_with_the_session():
    """Kills: shares revealed before a vector was masked; a restarted client that answers with other secrets."""
    room, values = ready()
    with pytest.raises(WireError, match="before the vector's turn"):
        room.session("c01").reveal(wire.SURVIVORS + wire.pack_set({0, 1, 2}, 5))
    fresh = Vault(wire.member_id(HEAD, "c01"), least, None)
    with pytest.raises(WireError, match="started again"):
        fresh.session(3, HEAD, "first")
    fresh.begin(3, HEAD, "second")
    for number, head, attempt in ((3, HEAD, "first"), (4, HEAD, "second"), (3, "cd" * 32, "second")):
        with pytest.raises(WireError, match="no keys for this attempt"):
            fresh.session(number, head, attempt)
    with pytest.raises(WireError, match="before the shares"):
        fresh.session(3, HEAD, "second").mask(room.server.mail("c01"), words_of("c01", values["c01"]))


def test_a_client_wants_its_own_keys_and_enough_company_in_the_table():
    """Kills: a server that lowers the threshold, puts other keys in a client's name, or names one twice."""
    room = Room(5)
    room.keys()
    table, session = room.server.table(), room.session("c01")
    with pytest.raises(WireError, match="got threshold 2 of 5 clients, expected at least 3"):
        session.shares(2, table)
    entry = wire.ENTRY_BYTES
    own = 4 + entry
    with pytest.raises(WireError, match="without this client's keys"):
        session.shares(3, table[: own + 20] + b"\0" + table[own + 21 :])
    with pytest.raises(WireError, match="a client or a key twice"):
        session.shares(3, table + table[4 : 4 + entry])
    with pytest.raises(WireError, match="multiple of"):
        session.shares(3, table[:-1])
    assert session.shares(3, table)
    with pytest.raises(WireError, match="again with other words"):
        session.shares(4, table)


def test_one_wrong_share_is_found_and_left_out():
    """Kills: a sum spoilt by one client's lie; an honest client blamed for it."""
    room, values = ready()
    room.send(values, away={"c04"})
    survivors = room.server.survivors()
    for name in ("c00", "c01", "c02", "c03"):
        payload = bytearray(room.session(name).reveal(survivors))
        if name == "c01":
            payload[4 + 10] ^= 255
        room.server.take_revealed(name, bytes(payload))
    mean = GRID.mean(room.server.total(), 4)
    assert np.array_equal(mean.numbers, plain_sum(values, ["c00", "c01", "c02", "c03"]) / mean.weight)
    assert room.server.liars() == ["c01"]


def test_a_wrong_share_without_a_spare_ends_the_round():
    """Kills: garbage taken for the sum."""
    room, values = ready()
    room.send(values)
    survivors = room.server.survivors()
    for name in ("c00", "c01", "c02"):
        payload = bytearray(room.session(name).reveal(survivors))
        payload[4 + 10] ^= name == "c01"
        room.server.take_revealed(name, bytes(payload))
    with pytest.raises(FederationError, match="shares of 'c00' do not fit"):
        room.server.total()


def test_the_server_refuses_wrong_sizes_strangers_and_repetitions():
    """Kills: a client counted twice; a vector of another length; a message out of its stage."""
    room, values = Room(5), updates_of(5)
    keys = room.vaults["c00"].begin(3, HEAD, "first")
    room.server.take_keys("c00", keys)
    with pytest.raises(WireError, match="twice"):
        room.server.take_keys("c00", keys)
    with pytest.raises(WireError, match="there already"):
        room.server.take_keys("c01", keys)
    with pytest.raises(WireError, match="got 67 bytes of SAK1, expected 68"):
        room.server.take_keys("c01", keys[:-1])
    with pytest.raises(WireError, match="was not asked"):
        room.server.take_keys("eve", keys)
    with pytest.raises(WireError, match="was not asked"):
        room.server.take_vector("c00", b"SAV1")
    room, values = ready()
    room.send(values, away={"c04"})
    with pytest.raises(WireError, match="'c01' twice"):
        room.server.take_vector("c01", room.vectors["c01"])
    with pytest.raises(WireError, match="bytes of SAV1, expected"):
        room.server.take_vector("c04", room.vectors["c01"] + b"\0")
    survivors = room.server.survivors()
    with pytest.raises(WireError, match="was not asked"):
        room.server.take_vector("c04", room.vectors["c01"])
    with pytest.raises(WireError, match="'c04', who was not asked"):
        room.server.take_revealed("c04", room.session("c01").reveal(survivors))


def test_a_repeated_round_is_opened_for_the_same_clients_only(tmp_path):
    """Kills: two sums of one round whose difference is a single update; a record that a restart forgets."""
    values = updates_of(3)
    path = tmp_path / "opened.json"
    me = wire.member_id(HEAD, "c00")
    for attempt, away, fits in (("first", set(), True), ("second", set(), True), ("third", {"c02"}, False)):
        room = Room(3, attempt=attempt)
        room.vaults["c00"] = Vault(me, least, path)  # as after a restart
        room.keys()
        room.shares()
        room.send(values, away=away)
        if fits:
            room.reveal()
            continue
        with pytest.raises(WireError, match="sum of other clients"):
            room.reveal()
    room = Room(3, number=4, attempt="fourth")
    room.vaults["c00"] = Vault(me, least, path)
    room.keys()
    room.shares()
    room.send(values, away={"c02"})
    room.reveal()


# -- parts ------------------------------------------------------------------------------------------------------


def test_any_threshold_of_shares_gives_the_secret_and_fewer_do_not():
    """Kills: a polynomial of the wrong degree; a modulus that is no prime above 2^256."""
    prime = shamir.PRIME
    assert all(pow(a, prime - 1, prime) == 1 for a in (2, 3, 5, 7, 11)) and prime > 2**256
    secret = bytes(range(31)) + b"\xff"
    shares = shamir.split(secret, 5, 3)
    for points in itertools.combinations(range(5), 3):
        factors = shamir.at_zero([p + 1 for p in points])
        assert shamir.join([shares[p] for p in points], factors) == secret
    for points in itertools.combinations(range(5), 2):
        assert shamir.join([shares[p] for p in points], shamir.at_zero([p + 1 for p in points])) != secret


@pytest.mark.parametrize(
    ("clients", "weight", "clip", "bits"), [(128, 1024, 1.0, 32), (16, 1, 0.3, 16), (2, 1, 7e3, 32)]
)
def test_no_sum_wraps_around_and_the_grid_is_as_fine_as_it_can_be(clients, weight, clip, bits):
    """Kills: a sum of full clients that changes its sign; bits given away."""
    grid = FixedPoint(clip, bits, clients, weight, "nearest")
    one = grid.words(np.array([clip, -clip, 10 * clip]), weight, 1e9, np.random.default_rng(0))
    total = np.zeros_like(one)
    for _ in range(clients):
        total += one
    mean = grid.mean(total, clients)
    step = clip / grid.levels
    assert np.allclose(mean.numbers, [clip, -clip, clip], atol=step, rtol=0)
    assert mean.loss == 16.0
    assert mean.clipped_frac == pytest.approx(1 / 3, abs=2 / grid.levels)
    assert 2 * clients * weight * (grid.levels + 1) > 2 ** (bits - 1)  # one more bit would not fit


def test_stochastic_rounding_has_no_bias():
    """Kills: rounding that always falls to the same side. 4 sigma of 40,000 draws."""
    grid = FixedPoint(1.0, 16, 16, 1, "stochastic")
    step = 1 / grid.levels
    words = grid.words(np.full(40_000, 0.3 * step), 1, 0.0, np.random.default_rng(5))
    mean = grid.mean(words, 1).numbers.mean()
    assert abs(mean / step - 0.3) < 4 * (0.3 * 0.7 / 40_000) ** 0.5


def test_sums_that_no_clipped_updates_give_are_refused():
    """Kills: a weight of zero or beyond the cap; numbers beyond the clip; garbage after a failed opening."""
    words = GRID.words(np.ones(4), 8, 0.0, np.random.default_rng(0))
    assert GRID.mean(words, 1) is not None
    assert GRID.mean(words, 9) is None  # nine clients weigh nine at least
    too_heavy, too_large = words.copy(), words.copy()
    too_heavy[0] = 9
    too_large[-1] += np.uint32(8)
    assert GRID.mean(too_heavy, 1) is None
    assert GRID.mean(too_large, 1) is None


@pytest.mark.parametrize(("fraction", "expected"), [(0.6, [2, 2, 3, 3, 4, 6, 60]), (0.501, [2, 2, 3, 3, 4, 6, 51])])
def test_the_threshold_is_above_half_and_leaves_a_third_out(fraction, expected):
    assert [wire.threshold_of(fraction, s) for s in (2, 3, 4, 5, 6, 10, 100)] == expected
    for clients in range(2, 300):
        assert clients / 2 < wire.threshold_of(0.6, clients) <= clients - clients // 3


def test_the_commitment_fits_one_seed_in_one_round():
    assert seed_commitment(b"a" * 32, b"x" * 32) != seed_commitment(b"b" * 32, b"x" * 32)
    assert seed_commitment(b"a" * 32, b"x" * 32) != seed_commitment(b"a" * 32, b"y" * 32)
