"""Steps that a client takes while its answer travels: nobody sees them but the clock."""

import threading
from collections import Counter
from dataclasses import replace

import pytest

from engine.telling_client import TellingClient
from federating import content, independent, plan, quiet, write_rows
from kilotune.engine.deployed import serve
from kilotune.engine.flower.keys import init_server
from kilotune.engine.flower.local import LocalExchange
from kilotune.engine.model.base import load_base
from kilotune.engine.rounds.ahead import Ahead
from kilotune.engine.rounds.federation import Federation
from kilotune.engine.rounds.following import head_after
from kilotune.engine.rounds.ledger import MEMBERS_BYTES, Ledger
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.session import federate, header
from kilotune.optimizer.adamw import AdamW
from kilotune.optimizer.proximal import Proximal
from ports import free_port

NAMES, ROUNDS, STEPS, OVERLAP, PATIENCE_S = ("ada", "bob"), 4, 3, 2, 60
HALVES = "{name: fragments, count: 2, codec: {name: dense, dtype: fp32}}"  # of which every bit tells
SETTINGS = (f"uplink={HALVES}", f"downlink={HALVES}", f"streaming.overlap={OVERLAP}", f"local_steps={STEPS}")
SETTINGS += (f"rounds={ROUNDS}", "batch_size=2", "evaluation.every=0", "lr_schedule=wsd", "warmup_frac=0.1")
SETTINGS += ("clients=[{share: 0.6, batch_size: 3}]", "parametrization.config={r: 2, target_modules: [q_proj]}")


@pytest.fixture(scope="module")
def recipe(base, tmp_path_factory):
    rows = write_rows(tmp_path_factory.mktemp("ahead") / "rows.jsonl", 4, NAMES)
    return plan(base, rows, "streaming_diloco", *SETTINGS)


class Client:
    """A worker on a machine of its own, and the (round, step, thread) of every step it takes."""

    def __init__(self, name, recipe, base, folder):
        self.worker = independent(name, recipe, base, folder)
        self.worker._progress = self._note
        self.steps = []
        self.on_step = lambda number, step: None

    def _note(self, line):
        _, number, _, at, *_ = line.split()
        step = (int(number), int(at.partition("/")[0]))
        self.steps.append((*step, threading.current_thread().name))
        self.on_step(*step)

    def ahead(self, most=STEPS):
        """Work ahead until so many steps of the round are done."""
        asked = threading.Event()
        self.on_step = lambda number, step: asked.set() if step >= most else None
        asked.set() if most == 0 else None
        self.worker.ahead(asked)
        self.on_step = lambda number, step: None


def lead(recipe, base, folder, exchange):
    """A server over this exchange; returns its ledger."""
    loaded = load_base(str(base), writable=True)
    ledger = Ledger(header(recipe, loaded))
    Federation(recipe, Replica(loaded, recipe), ledger, exchange, folder, quiet).run()
    return ledger


@pytest.fixture(scope="module")
def waiting(recipe, base, tmp_path_factory):
    """A run of clients that never work ahead: its ledger, and by round what ada is asked and answers."""
    folder, told = tmp_path_factory.mktemp("waiting"), {}
    workers = {name: independent(name, recipe, base, folder) for name in NAMES}

    def handle(request):
        reply = workers["ada"].handle(request)
        if request.kind == "train":
            told[request.body["round"]] = request, reply
        return reply

    return lead(recipe, base, folder, LocalExchange({"ada": handle, "bob": workers["bob"].handle})), told


@pytest.fixture
def told(waiting):
    return waiting[1]


def test_steps_taken_ahead_change_no_bit_and_are_taken_once(told, recipe, base, tmp_path):
    """Kills: own weights that depend on the state they are seen from; moments or batches of another step; a model that
    is not put back; steps thrown away, or taken twice, when a request comes early."""
    client = Client("ada", recipe, base, tmp_path)
    for number, pauses in ((1, (1, STEPS)), (2, (STEPS,)), (3, (0, 1)), (4, (STEPS,))):
        request, plain = told[number]
        assert client.worker.handle(request).payloads == plain.payloads
        before = client.worker.replica.digest()
        for most in pauses:
            client.ahead(most)
            assert client.worker.replica.digest() == before
            done = [step for n, step, _ in client.steps if n == number + 1]
            assert done == list(range(1, min(most, OVERLAP) + 1)) * (number < ROUNDS)
    assert [step[:2] for step in client.steps] == [(n, s) for n in told for s in range(1, STEPS + 1)]


# -- what nobody could foresee ----------------------------------------------------------------------------------------


def another_rate(told, client):
    request = told[2][0]
    return replace(request, body={**request.body, "progress": 0.05})  # while the rate rises


def another_group(told, client):
    request = told[4][0]
    return replace(request, body={**request.body, "group": -1})


def a_round_later(told, client):
    second, third = told[2][0], told[3][0]
    return replace(third, body={**third.body, "first": 1}, payloads=second.payloads + third.payloads)


def another_history(told, client):
    """She follows round 2, and then another round 1 is told."""
    request, worker, plan = told[3][0], client.worker, client.worker.replica.plan
    assert worker.handle(replace(request, kind="evaluate")).error is None
    client.ahead()
    worker._reopen = lambda: Replica(load_base(plan.recipe.base, writable=True), plan)
    other = bytes(MEMBERS_BYTES) + told[4][0].payloads[0][MEMBERS_BYTES:]  # round 3 moves the same fragment
    head = head_after(plan, 2, head_after(plan, 1, worker._genesis, other), request.payloads[0])
    return replace(request, body={**request.body, "first": 1, "head": head}, payloads=(other, *request.payloads))


def walk(folder, recipe, base, told, asked, works):
    """Her answers to round 1 and to what is asked then, with the steps of each."""
    client, found = Client("ada", recipe, base, folder), []
    if not works:
        client.ahead = lambda: None
    client.worker.handle(told[1][0])
    for unforeseen in asked:
        client.ahead()
        assert (client.worker._begun is not None) == works
        request = unforeseen(told, client)
        client.steps.clear()
        reply = client.worker.handle(request)
        assert reply.error is None
        found.append((reply.payloads, [step[:2] for step in client.steps]))
    return found


@pytest.mark.parametrize("asked", [(a_round_later, another_group), (another_rate, another_history)])
def test_what_was_not_foreseen_is_computed_from_its_start(told, recipe, base, tmp_path, asked):
    """Kills: steps of another rate, group, round or history that count."""
    worked, waited = (walk(tmp_path / str(works), recipe, base, told, asked, works) for works in (True, False))
    assert worked == waited
    assert all(len(steps) == STEPS for _, steps in worked)


def test_a_rule_that_looks_at_where_a_round_begins_takes_no_step_before(told, recipe, base, tmp_path):
    """Kills: a proximal pull towards the state of the round before."""
    assert (Proximal().anchored, AdamW().anchored) == (True, False)
    client = Client("ada", replace(recipe, optimizer=Proximal()), base, tmp_path)
    client.worker._trained = told[1][0].body | {"group": -1}
    client.ahead()
    assert client.steps == []


# -- in a thread ------------------------------------------------------------------------------------------------------


def test_a_request_waits_for_one_step_and_goes_on_from_there(told, recipe, base, tmp_path):
    """Kills: a request that waits for all steps ahead; steps that are thrown away; training beside them; a model left
    half way by a step that fails, or a round that goes on from it."""
    client, heard = Client("ada", recipe, base, tmp_path), []
    began, failed = threading.Event(), threading.Event()

    def work(asked):
        heard.append(asked)
        client.worker.ahead(asked)

    def watch(number, step):
        if (number, step) == (2, 1):
            began.set()
            assert heard[0].wait(PATIENCE_S), "no request is heard while a step is taken"
        if (number, step) == (3, 1) and not failed.is_set():
            failed.set()
            raise RuntimeError("out of memory")

    client.on_step = watch
    ahead = Ahead(client.worker.handle, work)
    ahead.handle(told[1][0])
    for number, ready in ((2, began), (3, failed)):
        assert ready.wait(PATIENCE_S), "no step is taken between requests"
        assert ahead.handle(told[number][0]).payloads == told[number][1].payloads
    ahead.pause()
    found = {n: [(s, thread == "ahead") for at, s, thread in client.steps if at == n] for n in (2, 3)}
    assert found == {
        2: [(1, True), (2, False), (3, False)],
        3: [(1, True), (1, False), (2, False), (3, False)],
    }


class Held(LocalExchange):
    """Nobody is asked for a round before all have worked ahead of it: what a link does that takes as long."""

    def __init__(self, clients):
        self._aheads = {name: Ahead(client.worker.handle, client.worker.ahead) for name, client in clients.items()}
        self._done = {(name, n): threading.Event() for name in clients for n in range(1, ROUNDS + 1)}
        for name, client in clients.items():
            client.on_step = lambda number, step, name=name: step == OVERLAP and self._done[name, number].set()
        super().__init__({name: ahead.handle for name, ahead in self._aheads.items()})

    def exchange(self, requests, deadline_s=None, keep=False):
        for name, request in requests.items():
            number = request.body.get("round", 1)
            if request.kind == "train" and number > 1:
                assert self._done[name, number].wait(PATIENCE_S), f"{name} waits for round {number} and does nothing"
        yield from super().exchange(requests, deadline_s, keep)

    def close(self):
        for ahead in self._aheads.values():
            ahead.pause()


def test_clients_work_while_a_rounds_result_travels_and_end_where_waiting_ones_end(waiting, recipe, base, tmp_path):
    """Kills: a client that waits for the result before steps that do not need it; any bit that depends on who waits."""
    clients = {name: Client(name, recipe, base, tmp_path) for name in NAMES}
    exchange = Held(clients)
    try:
        ledger = lead(recipe, base, tmp_path / "server", exchange)
    finally:
        exchange.close()
    assert ledger.head == waiting[0].head
    share = {True: OVERLAP, False: STEPS - OVERLAP}
    for client in clients.values():
        taken = Counter((number, thread == "ahead") for number, _, thread in client.steps)
        assert taken == {(1, False): STEPS} | {(n, late): share[late] for n in range(2, ROUNDS + 1) for late in share}


# -- between processes ------------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_over_tls_clients_work_before_a_result_leaves_and_end_where_a_simulation_ends(waiting, recipe, base, tmp_path):
    """Every result is held back until all clients have taken all steps that need none; then one client is killed.

    Kills: a client that does nothing while it pushes and polls; a bit that depends on where clients are; steps ahead
    that are half remembered.
    """
    keys = init_server(tmp_path / "keys", "127.0.0.1", free_port(), list(NAMES))
    rows = recipe.recipe.data.path
    parts = {name: content(base, rows, "streaming_diloco", *SETTINGS, f"data.only={name}") for name in NAMES}
    clients = {name: TellingClient(tmp_path / name, keys.join_path(name), parts[name]) for name in NAMES}

    def hold(event):
        if event["event"] == "round" and event["round"] < ROUNDS:
            for name, client in clients.items():
                what = f"{name} waits for the result of round {event['round']} and does nothing"
                assert client.steps[event["round"] + 1, OVERLAP].wait(PATIENCE_S), what
        if event["event"] == "round" and event["round"] == 2:
            clients["bob"].kill()
            clients["bob"].start()

    try:
        deployed = serve(recipe, tmp_path / "keys", tmp_path / "server", len(NAMES), hold)
        for client in clients.values():
            client.process.wait(PATIENCE_S)
    finally:
        for client in clients.values():
            client.kill()
    simulated = federate(recipe, tmp_path / "simulated", quiet)
    assert deployed["ledger_head"] == simulated["ledger_head"] == waiting[0].head
    assert {client.digest for client in clients.values()} == {deployed["digest"]} == {simulated["digest"]}
