"""Real workers behind signed messages: same digest, and a client that stands elsewhere starts again without a vote."""

import pytest

from federating import CLIENTS, plan, quiet
from kilotune.engine.model.base import load_base
from kilotune.engine.rounds.federation import Federation
from kilotune.engine.rounds.identity import HistoryError, read_heads
from kilotune.engine.rounds.ledger import Ledger
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rounds.worker import Worker
from kilotune.engine.session import encode_rows, evaluator, federate, header, split_rows
from sealing import Ends


class Sealed:
    """An Exchange over `Ends`: what is deployed, without processes. `before` may do something to a client."""

    def __init__(self, ends, before=lambda name, request: None):
        self._ends, self._before = ends, before

    def roster(self):
        return sorted(self._ends.posts)

    def exchange(self, requests, deadline_s=None):
        for name in sorted(requests):
            self._before(name, requests[name])
            yield name, self._ends.round_trip(name, requests[name])

    def traffic(self):
        return None


@pytest.fixture
def deployment(base, data, tmp_path):
    """(plan, ends, workers, a function that makes a federation)."""
    recipe = plan(base, data, "kilotune", "rounds=4", "local_steps=1", "batch_size=2", "evaluation.limit=3")
    workers = {}
    ends = Ends(tmp_path, *CLIENTS, handlers={name: lambda r, name=name: workers[name].handle(r) for name in CLIENTS})

    def replica():
        return Replica(load_base(str(base), writable=True), recipe)

    def start(name):
        loaded = replica()
        genesis = header(recipe, loaded.base).hash
        rows = split_rows(recipe, alone=False).clients[name]
        examples, folder = encode_rows(recipe, loaded.base, rows, "", quiet), tmp_path / name
        link = lambda n, head, part: ends.heads[name].follow(n, head, recipe.root(n), part)  # noqa: E731
        workers[name] = Worker(
            name, loaded, genesis, examples, [], evaluator(recipe, quiet), folder, True, link=link, reopen=replica
        )

    for name in CLIENTS:
        start(name)

    def federation(folder, emit=quiet, before=lambda name, request: None):
        loaded = load_base(str(base), writable=True)
        ledger = Ledger.open(tmp_path / folder, header(recipe, loaded))
        return Federation(recipe, Replica(loaded, recipe), ledger, Sealed(ends, before), tmp_path / folder, emit)

    return recipe, ends, workers, start, federation


def test_signed_messages_change_no_bit(deployment, tmp_path):
    """Kills: facts or payloads that signing changes; a signature that training depends on."""
    recipe, _, workers, _, federation = deployment
    run = federation("server")
    run.run()
    plain = federate(recipe, tmp_path / "plain", quiet)
    assert run.replica.digest() == plain["digest"]
    assert run.ledger.head == plain["ledger_head"]
    assert {worker.replica.digest() for worker in workers.values()} == {plain["digest"]}
    for name in CLIENTS:
        heads = read_heads(tmp_path / name)
        assert (heads.rounds, heads.links[4].head) == (4, run.ledger.head)


def test_a_client_on_another_history_starts_again_and_has_no_vote_until_then(deployment):
    """Kills: a vote from other weights; a client that is lost for good; a server that sends it what it missed only."""
    _, _, workers, _, federation = deployment
    events = []

    def before(name, request):
        if name == "bob" and request.kind == "train" and request.body["round"] == 3:
            workers["bob"].head = "00" * 32  # its memory is wrong

    run = federation("server", events.append, before)
    run.run()
    assert [[c.client for c in r.contributions] for r in run.ledger.records] == [
        ["ada", "bob", "cyd"],
        ["ada", "bob", "cyd"],
        ["ada", "cyd"],
        ["ada", "bob", "cyd"],
    ]
    (astray,) = [event for event in events if event.get("status") == "astray"]
    assert astray["client"] == "bob"
    assert workers["bob"].replica.digest() == run.replica.digest()


def test_a_round_altered_on_the_clients_disk_is_fetched_again(deployment, tmp_path):
    """Kills: weights rebuilt from a file nobody checked; a client that blames the server for its own disk."""
    _, _, workers, start, federation = deployment
    killed = RuntimeError("the server stops here")

    def stopping(event):
        if event["event"] == "round" and event["round"] == 2:
            raise killed

    with pytest.raises(RuntimeError, match="stops here"):
        federation("server", stopping).run()
    path = tmp_path / "bob" / "rounds" / "00001.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    ends = deployment[1]
    ends.desk = ends.server(2)
    ends.start("bob")
    start("bob")
    assert workers["bob"].round == 0
    run = federation("server")
    run.run()
    assert len(run.ledger.records[-1].contributions) == 3
    assert workers["bob"].replica.digest() == run.replica.digest()


def test_a_server_that_starts_its_run_anew_is_refused_by_all(deployment, tmp_path):
    """Kills: clients that follow a server back to the beginning."""
    _, ends, _, _, federation = deployment
    federation("server").run()
    with pytest.raises(HistoryError, match="took rounds back: it offers 0, but signed round 4 before"):
        federation("another", quiet).run()
    assert ends.heads["ada"].rounds == 4
