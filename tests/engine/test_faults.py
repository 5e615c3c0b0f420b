"""Faults: messages that are lost, clients that are late, disks that are full. Nothing is lost but the work not sent."""

import errno
import os

import numpy as np
import pytest

from federating import CLIENTS, independent, plan, quiet, write_rows
from kilotune.core.errors import FederationError, IncompatibleError, RunError, WireError
from kilotune.core.rng import stream
from kilotune.core.types import SeedUpdate
from kilotune.engine.flower.local import LocalExchange
from kilotune.engine.model.base import load_base
from kilotune.engine.rounds.federation import Federation
from kilotune.engine.rounds.guard import bounded
from kilotune.engine.rounds.ledger import Ledger
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.session import federate, header

LOSS = 0.3
SMALL = ["local_steps=1", "batch_size=2", "evaluation.limit=3"]


class Lossy(LocalExchange):
    """Loses every message with the same chance: a request before it arrives, or a reply after the work was done."""

    def __init__(self, handlers, rng) -> None:
        super().__init__(handlers)
        self._rng, self.healed = rng, False
        self.lost: set[tuple[str, str]] = set()
        self.delivered: dict[tuple[int, str], bytes] = {}

    def exchange(self, requests, deadline_s=None, keep=False):
        for client in sorted(requests):
            kind = requests[client].kind
            if self._loses(kind, "request"):
                continue
            for _, reply in super().exchange({client: requests[client]}):
                if self._loses(kind, "reply"):
                    continue
                if kind == "train":
                    assert reply.error is None, reply.error
                    self.delivered[requests[client].body["round"], client] = reply.payloads[0]
                yield client, reply

    def _loses(self, kind: str, which: str) -> bool:
        if self.healed or self._rng.random() >= LOSS:
            return False
        self.lost.add((kind, which))
        return True


def server_of(recipe, base, folder):
    loaded = load_base(str(base), writable=True)
    return Replica(loaded, recipe), Ledger.open(folder, header(recipe, loaded))


def sent_and_summed(recipe, replica, ledger, payloads, number) -> tuple[np.ndarray, np.ndarray]:
    """What the ledger says of a round, and Σ weight · update over the payloads of those it names, plainly."""
    context = replica.context(number)

    def flat(update) -> np.ndarray:
        if isinstance(update, SeedUpdate):
            return np.bincount(update.indices, weights=update.coefs.astype(np.float64), minlength=context.size)
        return np.concatenate([update.tensors[name].double().numpy().ravel() for name in sorted(update.tensors)])

    total = 0.0
    for part in ledger.records[number - 1].contributions:
        update = bounded(recipe.uplink.decode(payloads[number, part.client], context), part.limit, part.scale)
        total = total + part.weight * flat(update)
    return flat(recipe.downlink.decode(ledger.payload(number), context)), total


@pytest.mark.parametrize(
    ("name", "rounds", "settings"),
    [
        ("kilotune", 25, ("downlink={name: dense, dtype: fp32}",)),
        ("kilotune_zeroth", 10, ("optimizer.lr=1.0e-4", "basis.refresh=run")),
    ],
)
def test_messages_lost_at_every_boundary_cost_nothing_but_their_own_part(base, data, tmp_path, name, rounds, settings):
    """Kills: a lost hello, answer or farewell that holds up the run; an answer counted twice or not at all; a client
    whose own state advances for an answer that never arrived; weights that differ at the end."""
    recipe = plan(base, data, name, *SMALL, f"rounds={rounds}", "min_clients=2", *settings)
    workers = {client: independent(client, recipe, base, tmp_path) for client in CLIENTS}
    exchange = Lossy({client: worker.handle for client, worker in workers.items()}, stream(0, "losses"))
    replica, ledger = server_of(recipe, base, tmp_path / "server")

    def lead() -> None:
        Federation(recipe, replica, ledger, exchange, tmp_path / "server", quiet).run()

    boundaries = {(kind, w) for kind in ("hello", "train", "evaluate", "finish") for w in ("request", "reply")}
    for _ in range(1000):  # the same command again and again
        if len(ledger) == rounds and exchange.lost == boundaries:
            break
        try:
            lead()
        except FederationError as error:
            assert "min_clients is 2" in str(error) or "could join" in str(error)
    assert exchange.lost == boundaries
    assert [record.round for record in ledger.records] == list(range(1, rounds + 1))
    for number in range(1, rounds + 1):
        named = {part.client for part in ledger.records[number - 1].contributions}
        assert named == {client for n, client in exchange.delivered if n == number}
        sent, summed = sent_and_summed(recipe, replica, ledger, exchange.delivered, number)
        np.testing.assert_allclose(sent, summed, rtol=1e-6, atol=1e-12)
    exchange.healed = True
    lead()
    assert {worker.replica.digest() for worker in workers.values()} == {replica.digest()}
    rebuilt, _ = server_of(recipe, base, tmp_path / "server")
    rebuilt.replay((record.round, payload) for record, payload in ledger.since(0))
    assert rebuilt.digest() == replica.digest()


# -- more asked than needed --------------------------------------------------------------------------------------------

MANY = tuple(f"c{i}" for i in range(8))
SPARE = "schedule={name: over_select, clients_per_round: 2, factor: 1.5}"


class Killed(BaseException):
    """Stands for kill -9: no handler in the product catches it."""


def test_a_simulated_round_counts_the_answers_drawn_for_it_also_when_it_is_resumed(base, tmp_path):
    """Kills: the first by name always preferred; spare clients that are waited for or counted; another draw after a
    kill."""
    recipe = plan(base, write_rows(tmp_path / "rows.jsonl", 4, MANY), "kilotune", *SMALL, "rounds=15", SPARE)
    events = []
    whole = federate(recipe, tmp_path / "whole", events.append)
    assert {(e["asked"], e["clients"]) for e in events if e["event"] == "round"} == {(3, 2)}
    left_out = []
    for record in Ledger.load(tmp_path / "whole").records:
        asked = recipe.schedule.sample(record.round, list(MANY), stream(0, "schedule", record.round))
        (spare,) = set(asked) - {part.client for part in record.contributions}
        left_out.append(asked.index(spare))
    assert min(left_out.count(place) for place in range(3)) >= 1  # of 15, five expected: 1 is 2.2 sigma below

    def dying(event):
        if event["event"] == "client" and event.get("round") == 3 and event["status"] == "ok":
            raise Killed

    with pytest.raises(Killed):
        federate(recipe, tmp_path / "cut", dying)
    assert federate(recipe, tmp_path / "cut", quiet)["ledger_head"] == whole["ledger_head"]


class InOrder(LocalExchange):
    """Replies to train requests come in an order of their own; everything asked is written down."""

    def __init__(self, handlers, order) -> None:
        super().__init__(handlers)
        self._order, self.asked = order, []

    def exchange(self, requests, deadline_s=None, keep=False):
        training = any(request.kind == "train" for request in requests.values())
        for client in sorted(requests, key=self._order.index if training else None):
            self.asked.append((requests[client].kind, client))
            yield from super().exchange({client: requests[client]})


def test_a_round_ends_with_the_s_th_answer_and_the_others_stay_members(base, data, tmp_path):
    """Kills: waiting for the spare client; asking it again who it is; an answer that came first and does not count."""
    recipe = plan(
        base, data, *("kilotune", *SMALL), "schedule={name: over_select, clients_per_round: 2, factor: 1.5}", "rounds=3"
    )
    workers = {client: independent(client, recipe, base, tmp_path) for client in CLIENTS}
    handlers = {client: worker.handle for client, worker in workers.items()}
    exchange = InOrder(handlers, ["cyd", "bob", "ada"])
    replica, ledger = server_of(recipe, base, tmp_path / "server")
    events = []
    Federation(recipe, replica, ledger, exchange, tmp_path / "server", events.append).run()
    assert [[p.client for p in record.contributions] for record in ledger.records] == [["bob", "cyd"]] * 3
    assert ("train", "ada") not in exchange.asked
    assert exchange.asked.count(("hello", "ada")) == 1
    assert not [event for event in events if event.get("status") in ("missing", "error")]
    assert workers["ada"].replica.digest() == replica.digest()


def test_an_answer_that_cannot_be_read_does_not_take_a_seat(base, data, tmp_path):
    """Kills: a round that ends short because a spoilt answer was counted among the first S."""
    recipe = plan(
        base, data, *("kilotune", *SMALL), "schedule={name: over_select, clients_per_round: 2, factor: 1.5}", "rounds=1"
    )
    workers = {client: independent(client, recipe, base, tmp_path) for client in CLIENTS}

    def spoilt(request):
        reply = workers["ada"].handle(request)
        return type(reply)(reply.body, tuple(payload[:-1] for payload in reply.payloads), reply.error)

    handlers = {"ada": spoilt, "bob": workers["bob"].handle, "cyd": workers["cyd"].handle}
    replica, ledger = server_of(recipe, base, tmp_path / "server")
    Federation(recipe, replica, ledger, LocalExchange(handlers), tmp_path / "server", quiet).run()
    assert [part.client for part in ledger.records[0].contributions] == ["bob", "cyd"]


# -- late answers ------------------------------------------------------------------------------------------------------


class Slow(LocalExchange):
    """Replies of some clients take rounds to arrive: `rounds_late(round, client)`."""

    def __init__(self, handlers, rounds_late) -> None:
        super().__init__(handlers)
        self._rounds_late, self._held = rounds_late, {}
        self.sent_to_busy, self.dropped = [], []

    def exchange(self, requests, deadline_s=None, keep=False):
        self.sent_to_busy += sorted(set(requests) & set(self._held))
        if keep:
            self._held = {client: (left - 1, reply) for client, (left, reply) in self._held.items()}
            for client in [client for client, (left, _) in self._held.items() if left == 0]:
                yield client, self._held.pop(client)[1]
        for client, reply in super().exchange(requests):
            late = self._rounds_late(requests[client].body.get("round", 0), client) if keep else 0
            if late:
                self._held[client] = (late, reply)
            else:
                yield client, reply

    def kept(self):
        return set(self._held)

    def give_up(self, clients):
        for client in clients:
            del self._held[client]
            self.dropped.append(client)


STALE = ["basis.refresh=run", "rounds=6", "downlink={name: dense, dtype: fp32}"]


def asynchronous(base, data, folder, rounds_late, *settings):
    recipe = plan(base, data, "kilotune", *SMALL, *STALE, *settings)
    workers = {client: independent(client, recipe, base, folder) for client in CLIENTS}
    payloads = {}

    def watched(client):
        def handle(request):
            reply = workers[client].handle(request)
            if request.kind == "train":
                payloads[request.body["round"], client] = reply.payloads[0]
            return reply

        return handle

    exchange = Slow({client: watched(client) for client in CLIENTS}, rounds_late)
    replica, ledger = server_of(recipe, base, folder / "server")
    Federation(recipe, replica, ledger, exchange, folder / "server", quiet).run()
    assert {worker.replica.digest() for worker in workers.values()} == {replica.digest()}
    return recipe, replica, ledger, exchange, payloads


def test_a_late_answer_counts_in_a_later_round_with_less_weight(base, data, tmp_path):
    """Kills: a late answer thrown away, counted whole, counted twice, or decoded along other directions; a client that
    is asked for more while it works; an answer that is taken however late it is."""
    late = {(1, "cyd"): 1, (3, "cyd"): 3}
    recipe, replica, ledger, exchange, payloads = asynchronous(
        base, data, tmp_path, lambda number, client: late.get((number, client), 0), "staleness={max: 2, power: 0.5}"
    )
    everybody, two = list(CLIENTS), ["ada", "bob"]
    named = [[part.client for part in record.contributions] for record in ledger.records]
    assert named == [two, everybody, two, two, two, everybody]
    assert exchange.sent_to_busy == []
    assert exchange.dropped == ["cyd"]  # what it began in round 3 was too late in round 6, where it was asked anew
    weights = {part.client: part.weight for part in ledger.records[1].contributions}
    discount = 2**-0.5
    np.testing.assert_allclose(weights["cyd"], discount / (2 + discount), rtol=1e-12)  # all have as many rows
    payloads[2, "cyd"] = payloads[1, "cyd"]
    for number in range(1, 7):
        np.testing.assert_allclose(*sent_and_summed(recipe, replica, ledger, payloads, number), rtol=1e-6, atol=1e-12)


def test_without_the_option_a_late_answer_is_refused(base, data, tmp_path):
    """Kills: rounds that mix answers of several states although nobody asked for it."""
    from kilotune.engine.rounds.late import Lateness

    recipe = plan(base, data, "kilotune", "basis.refresh=run")
    _, ledger = server_of(recipe, base, tmp_path)
    record = ledger.append(recipe.root(1), b"payload", ())
    punctual = Lateness(recipe.recipe, ledger)
    assert punctual.rounds(2, 1, record.hash) == 0
    for held, head in ((0, ledger.header.hash), (1, ledger.header.hash), (2, record.hash), (-1, record.hash)):
        with pytest.raises(WireError, match="a stale or foreign answer"):
            punctual.rounds(2, held, head)
    patient = Lateness(plan(base, data, "kilotune", "basis.refresh=run", "staleness.max=1").recipe, ledger)
    assert patient.rounds(2, 0, ledger.header.hash) == 1
    with pytest.raises(WireError, match="a stale or foreign answer"):
        patient.rounds(2, 0, record.hash)


@pytest.mark.parametrize(
    ("name", "settings", "fix"),
    [
        ("kilotune", ("staleness.max=2",), "--set basis.refresh=run"),
        ("ferret", ("staleness.max=2",), "uplink: dense"),
        ("robust_coefficients", ("staleness.max=2", "basis.refresh=run"), "aggregation: mean"),
        ("private_central", ("staleness.max=2", "basis.refresh=run"), "--set staleness.max=0"),
        ("secure", ("staleness.max=2", "basis.refresh=run"), "--set staleness.max=0"),
        ("secure", (SPARE,), "schedule: uniform"),
        ("private_central", (SPARE,), "schedule: all, or uniform"),
    ],
)
def test_what_cannot_wait_is_refused_with_a_working_pair(base, data, name, settings, fix):
    """Kills: updates along other directions added up; noise, medians or masks that a late answer makes wrong."""
    with pytest.raises(IncompatibleError) as caught:
        plan(base, data, name, *settings)
    (problem,) = caught.value.problems
    assert fix in problem


# -- full disks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(base, data, tmp_path_factory):
    return federate(plan(base, data, "kilotune", *SMALL), tmp_path_factory.mktemp("whole") / "run", quiet)


FILES = ("ledger.jsonl", "payloads/00002.bin", "contributions/00002.bin", "state/server-00002", "metrics.jsonl")


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(base, data, tmp_path, monkeypatch, undisturbed):
    """Kills: a traceback; a round that is half there; another result after the space is back."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("the test finds the file of a descriptor in /proc")
    recipe, place, real = plan(base, data, "kilotune", *SMALL), tmp_path / "run", os.fsync
    for what in FILES:
        folder, stem = what.rpartition("/")[::2]

        def full(descriptor: int, folder=folder, stem=stem) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if f"/{folder}" in path and stem in path and (place / "payloads").exists():
                raise OSError(errno.ENOSPC, "No space left on device", path)
            real(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        told = r"the disk is full\. Free some space and run the same command again"
        with pytest.raises(RunError, match=told) as caught:
            federate(recipe, place, quiet)
        assert "\n" not in str(caught.value)
        monkeypatch.undo()
    again = federate(recipe, place, quiet)
    assert (again["digest"], again["ledger_head"]) == (undisturbed["digest"], undisturbed["ledger_head"])


def test_a_disk_that_is_full_for_one_simulated_client_ends_the_run(base, data, tmp_path, monkeypatch):
    """Kills: a round that goes on without a client and so comes to another result."""
    recipe, written = plan(base, data, "kilotune", *SMALL, "defences.enabled=false"), []

    def full(path, entry):
        written.append(entry.client)
        if len(written) == 2:
            raise RunError(f"{path}: the disk is full.")
        return 0

    monkeypatch.setattr("kilotune.engine.rounds.clientstate.append_entry", full)
    with pytest.raises(RunError, match="the disk is full"):
        federate(recipe, tmp_path / "run", quiet)
    monkeypatch.undo()
    undisturbed = federate(recipe, tmp_path / "whole", quiet)
    assert federate(recipe, tmp_path / "run", quiet)["digest"] == undisturbed["digest"]
