"""Secure aggregation in a federation: what is committed is what a plain sum of the same integers gives, whoever drops
out where, and nothing else about a client reaches the server."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from federating import CLIENTS, content, plan, quiet
from kilotune.core.errors import FederationError, IncompatibleError
from kilotune.core.types import SeedUpdate, TensorUpdate
from kilotune.engine.composing.compose import build
from kilotune.engine.flower.local import LocalExchange
from kilotune.engine.flower.messages import Reply, Request
from kilotune.engine.model.base import load_base
from kilotune.engine.planning.planner import payload_bytes
from kilotune.engine.rounds.federation import Federation
from kilotune.engine.rounds.ledger import Ledger
from kilotune.engine.rounds.replica import Replica, coordinates
from kilotune.engine.rounds.tally import outer_step
from kilotune.engine.rounds.worker import Worker
from kilotune.engine.secure import costs
from kilotune.engine.secure.capabilities import matrix
from kilotune.engine.secure.participant import Participant
from kilotune.engine.session import encode_rows, evaluator, federate, header, split_rows

MASKED = ("secure_aggregation.enabled=true", "defences.enabled=false", "keep_contributions=never")
QUICK = ("local_steps=1", "batch_size=2")
STAGES = ("secure.keys", "secure.shares", "train", "secure.unmask")


class Killed(BaseException):
    """Stands for kill -9."""


class Recorder:
    """What every client would have sent without masks: (update, rows) by client and round."""

    def __init__(self, monkeypatch) -> None:
        self.updates: dict[tuple[str, int], tuple] = {}
        whole = Participant.integers

        def integers(participant, update, num_examples, loss, number):
            self.updates[participant._client, number] = (update, num_examples)
            return whole(participant, update, num_examples, loss, number)

        monkeypatch.setattr(Participant, "integers", integers)


def vector(recipe, update) -> list[float]:
    if isinstance(update, SeedUpdate):
        sums = [0.0] * recipe.num_directions
        for index, coef in sorted(zip(update.indices.tolist(), update.coefs.tolist(), strict=True)):
            sums[index] += coef
        return sums
    return [x for name in sorted(update.tensors) for x in update.tensors[name].double().flatten().tolist()]


def plain_round(recipe, replica: Replica, number: int, members: dict[str, tuple], states: dict) -> bytes:
    """The oracle: integers made and added in Python, then the server's own step and downlink."""
    section = recipe.recipe.secure_aggregation
    weigh = (lambda n: 1) if recipe.aggregation.weighting == "equal" else (lambda n: min(n, section.max_weight))
    heaviest = 1 if recipe.aggregation.weighting == "equal" else section.max_weight
    room = (2 ** (section.bits - 1) - 1) // (section.max_clients * heaviest)
    exponent = math.floor(math.log2(room / section.clip))
    scale, top = 2.0**exponent, math.floor(section.clip * 2.0**exponent)
    weights = {client: weigh(rows) for client, (_, rows) in members.items()}
    columns = zip(*(vector(recipe, update) for update, _ in members.values()), strict=True)
    ws = list(weights.values())
    sums = [sum(w * max(-top, min(top, round(x * scale))) for w, x in zip(ws, row, strict=True)) for row in columns]
    mean = (np.array(sums, dtype=np.float64) / scale / sum(ws)).astype(np.float32)
    if recipe.uplink.takes == "seeds":
        used = np.flatnonzero(mean)
        combined = SeedUpdate(used, mean[used])
    else:
        tensors, at = {}, 0
        for name in sorted(replica.shapes):
            size = math.prod(replica.shapes[name])
            tensors[name] = torch.from_numpy(mean[at : at + size]).reshape(replica.shapes[name])
            at += size
        combined = TensorUpdate(tensors)
    stepped = outer_step(recipe.server_optimizer, combined, states["optimizer"])
    if isinstance(stepped, SeedUpdate) and recipe.downlink.takes == "tensors":
        stepped = coordinates(recipe, stepped)
    return recipe.downlink.encode(stepped, replica.context(number), states["downlink"])


def require_plain_sums(recipe, base: Path, ledger: Ledger, digest: str, recorded: Recorder) -> None:
    """Every committed round is the plain one of its members, and the rounds give these weights."""
    replica = Replica(load_base(str(base), writable=True), recipe)
    states: dict = {"optimizer": {}, "downlink": {}}
    for record, payload in ledger.since(0):
        members = {c.client: recorded.updates[c.client, record.round] for c in record.contributions}
        assert plain_round(recipe, replica, record.round, members, states) == payload, record.round
        replica.apply(record.round, payload)
    assert replica.digest() == digest


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("secure", ("secure_aggregation.clip=0.01", "aggregation.weighting=equal", "secure_aggregation.bits=16")),
        ("fedkseed", (*MASKED, "secure_aggregation.clip=1.0e-4", "local_steps=3")),
        ("fedavg_lora", (*MASKED, "rounds=1", "secure_aggregation.clip=0.1", "downlink.dtype=fp32")),
        ("mixed", MASKED),
    ],
)
def test_rounds_are_those_of_a_plain_sum_of_the_same_integers(base, data, tmp_path, monkeypatch, name, settings):
    """Kills: masks that leave a trace; a weight or a clip that only one side knows; another order of tensors."""
    recorded = Recorder(monkeypatch)
    recipe = plan(base, data, name, *settings)
    summary = federate(recipe, tmp_path / "run", quiet)
    assert summary["digest"] != summary["base_digest"]
    require_plain_sums(recipe, base, Ledger.load(tmp_path / "run"), summary["digest"], recorded)


# -- clients of their own ----------------------------------------------------------------------------------------


class Wire(LocalExchange):
    """Loses, per stage and round, what `lost` names: a client's request, or only its reply. Keeps what passed."""

    def __init__(self, handlers: dict, lost: Callable[[str, int, str], str | None]) -> None:
        super().__init__(handlers)
        self._lost, self.replies = lost, []

    def exchange(self, requests, deadline_s=None):
        kept = {}
        for client, request in requests.items():
            what = self._lost(request.kind, int(request.body.get("round", 0)), client)
            if what == "reply":
                list(super().exchange({client: request}))
            if what is None:
                kept[client] = request
        for client, reply in super().exchange(kept, deadline_s):
            self.replies.append((requests[client].kind, client, reply))
            yield client, reply


class Clients:
    """Three clients with a model and a folder each, that can be started again."""

    def __init__(self, recipe, base: Path, folder: Path) -> None:
        self.recipe, self._base, self._folder = recipe, base, folder
        self._rows = split_rows(recipe, alone=False).clients
        self.workers: dict[str, Worker] = {}
        for name in CLIENTS:
            self.start(name)

    def start(self, name: str) -> None:
        loaded = load_base(str(self._base), writable=True)
        examples = encode_rows(self.recipe, loaded, self._rows[name], name, quiet)
        genesis = header(self.recipe, loaded).hash
        replica = Replica(loaded, self.recipe)
        measure = evaluator(self.recipe, quiet)
        self.workers[name] = Worker(
            name, replica, genesis, examples, [], measure, self._folder / name, keeps_rounds=True
        )

    def handlers(self) -> dict:
        return {name: lambda request, name=name: self.workers[name].handle(request) for name in CLIENTS}


def lead(recipe, base: Path, folder: Path, exchange, emit=quiet) -> tuple[Ledger, Replica]:
    """A server over these clients until its rounds are done."""
    loaded = load_base(str(base), writable=True)
    replica, ledger = Replica(loaded, recipe), Ledger.open(folder, header(recipe, loaded))
    Federation(recipe, replica, ledger, exchange, folder, emit).run()
    return ledger, replica


@pytest.fixture(scope="module")
def recipe(base, data):
    """Clients with a memory, so that a state that advances twice would show."""
    return plan(base, data, "secure", "basis.refresh=run", "keep_optimizer=true", "evaluation.limit=1", *QUICK)


@pytest.fixture(scope="module")
def simulated(base, recipe, tmp_path_factory):
    return federate(recipe, tmp_path_factory.mktemp("simulated"), quiet)


def never(kind: str, number: int, client: str) -> str | None:
    return None


def test_clients_of_their_own_end_where_simulated_ones_do_and_tell_nothing_else(base, tmp_path, recipe, simulated):
    """Kills: a second path for deployed clients; rows, losses or a bare update beside the masked one."""
    clients = Clients(recipe, base, tmp_path)
    exchange = Wire(clients.handlers(), never)
    _, replica = lead(recipe, base, tmp_path / "server", exchange)
    assert replica.digest() == simulated["digest"]
    assert {worker.replica.digest() for worker in clients.workers.values()} == {replica.digest()}
    told = {kind: set(reply.body) for kind, _, reply in exchange.replies}
    assert told["train"] == {"round", "head", "attempt", "seconds", "peak_rss_bytes"}
    assert told["secure.keys"] == told["secure.shares"] == told["secure.unmask"] == {"round", "attempt"}
    assert "num_examples" not in told["hello"]
    vectors = [reply.payloads[0] for kind, _, reply in exchange.replies if kind == "train"]
    assert len(set(vectors)) == 6
    assert {len(payload) for payload in vectors} == {4 + 4 * (3 + 64)}


@pytest.mark.parametrize(("stage", "what"), list(zip(STAGES, ("request", "reply", "reply", "request"), strict=True)))
def test_a_client_lost_at_any_boundary_costs_only_its_own_part(base, tmp_path, recipe, monkeypatch, stage, what):
    """Kills: masks of the lost client in the sum; its memory moved by a round it is not part of (what it holds for the
    next rounds is what the plain sum is made from, too); a client that is not asked again."""
    recorded = Recorder(monkeypatch)
    clients, events = Clients(recipe, base, tmp_path), []

    def lost(kind, number, client):
        return what if (kind, number, client) == (stage, 1, "bob") else None

    ledger, replica = lead(recipe, base, tmp_path / "server", Wire(clients.handlers(), lost), events.append)
    members = [[c.client for c in record.contributions] for record in ledger.records]
    assert members == [["ada", "bob", "cyd"] if stage == "secure.unmask" else ["ada", "cyd"], ["ada", "bob", "cyd"]]
    require_plain_sums(recipe, base, ledger, replica.digest(), recorded)
    assert {worker.replica.digest() for worker in clients.workers.values()} == {replica.digest()}
    (missing,) = [event for event in events if event.get("status") == "missing"]
    assert (missing["client"], missing["round"]) == ("bob", 1)


@pytest.mark.parametrize("stage", STAGES[2:])
def test_below_the_threshold_the_same_command_later_ends_as_if_nothing_had_been(
    base, tmp_path, recipe, simulated, stage
):
    """Kills: a memory that moves twice when a round is repeated; an aborted round in the ledger; a stuck repetition."""
    clients = Clients(recipe, base, tmp_path)

    def lost(kind, number, client):
        return "reply" if (kind, number) == (stage, 2) and client != "ada" else None

    with pytest.raises(FederationError, match=r"round 2: 1 of 3 clients .*secure aggregation needs 2"):
        lead(recipe, base, tmp_path / "server", Wire(clients.handlers(), lost))
    assert len(Ledger.load(tmp_path / "server")) == 1
    _, replica = lead(recipe, base, tmp_path / "server", Wire(clients.handlers(), never))
    assert replica.digest() == simulated["digest"]


@pytest.mark.parametrize("before", ["train", "secure.unmask"])
def test_a_client_started_again_within_a_round_counts_as_dropped_and_comes_back(
    base, tmp_path, recipe, monkeypatch, before
):
    """Kills: secrets on disk; a restarted client that answers under other secrets, which would spoil the sum."""
    recorded = Recorder(monkeypatch)
    clients, events = Clients(recipe, base, tmp_path), []

    def lost(kind, number, client):
        if (kind, number, client) == (before, 1, "bob"):
            clients.start("bob")
        return None

    ledger, replica = lead(recipe, base, tmp_path / "server", Wire(clients.handlers(), lost), events.append)
    require_plain_sums(recipe, base, ledger, replica.digest(), recorded)
    assert len(ledger.records[0].contributions) == (3 if before == "secure.unmask" else 2)
    assert len(ledger.records[1].contributions) == 3
    (error,) = [event for event in events if event.get("status") == "error"]
    assert "no keys for this attempt" in error["why"]
    names = {path.name for path in (tmp_path / "bob").rglob("*") if path.is_file()}
    assert {name.split("-")[0].split(".")[0] for name in names} <= {"state", "opened", "00001", "00002"}


def test_a_server_killed_while_it_opens_a_sum_repeats_the_round_with_the_same_clients(
    base, tmp_path, recipe, monkeypatch
):
    """Kills: a second sum over other clients, whose difference from the first is one client's update."""
    recorded = Recorder(monkeypatch)
    clients = Clients(recipe, base, tmp_path)

    def dying(kind, number, client):
        if (kind, number) == ("train", 1) and client == "cyd":
            return "request"  # so that the sum is of two
        if (kind, number, client) == ("secure.unmask", 1, "bob"):
            raise Killed
        return None

    class Hasty(Wire):
        """The first client reveals before the server dies."""

        def exchange(self, requests, deadline_s=None):
            for client in sorted(requests):
                yield from super().exchange({client: requests[client]}, deadline_s)

    with pytest.raises(Killed):
        lead(recipe, base, tmp_path / "server", Hasty(clients.handlers(), dying))
    without_bob = {name: handler for name, handler in clients.handlers().items() if name != "bob"}
    with pytest.raises(FederationError, match=r"same clients\. Missing: bob\."):
        lead(recipe, base, tmp_path / "server", Wire(without_bob, never))
    ledger, replica = lead(recipe, base, tmp_path / "server", Wire(clients.handlers(), never))
    assert [len(record.contributions) for record in ledger.records] == [2, 3]
    require_plain_sums(recipe, base, ledger, replica.digest(), recorded)
    (tmp_path / "server" / "state" / "opening.json").unlink()  # a server that forgets is refused by the client itself
    opened = json.loads((tmp_path / "ada" / "opened.json").read_text())
    assert (opened["round"], len(opened["members"])) == (2, 3)


def test_a_spoilt_message_costs_the_client_that_sent_or_got_it(base, tmp_path, recipe, monkeypatch):
    """Kills: one bad client ending the round; a bad vector in the sum."""
    recorded = Recorder(monkeypatch)
    clients, events = Clients(recipe, base, tmp_path), []

    def spoilt(request: Request) -> Reply:
        reply = clients.workers["bob"].handle(request)
        if request.kind == "train" and request.body["round"] == 1:
            return Reply(reply.body, (reply.payloads[0][:-1],))
        if request.kind == "secure.shares" and request.body["round"] == 2:
            return Reply(reply.body | {"attempt": "earlier"}, reply.payloads)
        return reply

    exchange = Wire(clients.handlers() | {"bob": spoilt}, never)
    ledger, replica = lead(recipe, base, tmp_path / "server", exchange, events.append)
    assert [[c.client for c in record.contributions] for record in ledger.records] == [["ada", "cyd"]] * 2
    require_plain_sums(recipe, base, ledger, replica.digest(), recorded)
    assert [event["client"] for event in events if event.get("status") == "error"] == ["bob", "bob"]


def test_one_client_alone_is_refused(base, data, tmp_path, recipe):
    """Kills: a sum of one."""
    clients = Clients(recipe, base, tmp_path)
    alone = {"ada": clients.handlers()["ada"]}
    with pytest.raises(FederationError, match="1 clients are here, secure aggregation needs 2 to 128"):
        lead(recipe, base, tmp_path / "server", Wire(alone, never))


def test_a_round_short_of_min_clients_is_not_opened(base, tmp_path, recipe):
    """Kills: a sum opened for a round that does not count, which would bind its repetition."""
    clients = Clients(recipe, base, tmp_path)
    strict = build({**recipe.resolved(), "min_clients": 3}, "federate")
    asked = []

    def lost(kind, number, client):
        asked.append(kind)
        return "request" if (kind, client) == ("train", "bob") else None

    with pytest.raises(FederationError, match="min_clients is 3"):
        lead(strict, base, tmp_path / "server", Wire(clients.handlers(), lost))
    assert "secure.unmask" not in asked


# -- what it costs, what it cannot ---------------------------------------------------------------------------------


def test_the_plan_says_exactly_what_is_sent_and_the_report_what_was_added(base, data, tmp_path, recipe):
    """Kills: an estimate; a stage that is not counted."""
    folder, events = tmp_path / "run", []
    summary = federate(recipe, folder, events.append)
    predicted = payload_bytes(recipe, {"coords": 64}, 3)
    for way in ("up", "down"):
        key = f"payload_{way}_bytes_per_client_round"
        assert summary[key] == pytest.approx(predicted[key], abs=0.06)
        for event in events:
            if event["event"] == "round":
                per_client = event["secure"][f"added_{way}_bytes"] / 3
                assert per_client == pytest.approx(predicted[f"secure_{way}_bytes_per_client_round"], abs=0.06)
    bare = payload_bytes(plan(base, data, "secure", "secure_aggregation.enabled=false"), {"coords": 64}, 3)
    assert predicted["secure_up_bytes_per_client_round"] == (
        predicted["payload_up_bytes_per_client_round"] - bare["payload_up_bytes_per_client_round"]
    )
    page = (folder / "report.html").read_text()
    assert "Secure aggregation" in page
    assert costs.seconds(recipe, {"coords": 64}, 3) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["defences.enabled=true"], "hides the single updates that defences judge"),
        (["aggregation=trimmed_mean"], "hides what aggregation 'trimmed_mean' needs: it compares single updates"),
        (["keep_contributions=always"], "leaves no contribution to keep"),
        (["privacy={name: central, clip: 1.0, noise_multiplier: 1.0, clients: 3}"], "privacy 'central' clips on the"),
        (["schedule={name: uniform, clients_per_round: 200}"], "clients_per_round: got 200, expected 2 to"),
        (["secure_aggregation.bits=16"], "leave 0 levels for a number, expected at least 16"),
        (["uplink=projection", "aggregation=seed_sum", "downlink=projection"], "cannot mask uplink 'projection'"),
    ],
)
def test_parts_that_need_single_updates_are_refused_with_a_working_pair(base, data, settings, message):
    """Kills: a combination that starts and fails in a round, or that quietly does without its defence."""
    with pytest.raises(IncompatibleError) as caught:
        build(content(base, data, "secure", *settings), "federate")
    (found,) = [line for line in caught.value.problems if message in line]
    assert " Use " in found or "expected 2 to" in found


def test_scalars_by_direction_are_no_business_of_a_masked_sum(base, data):
    with pytest.raises(IncompatibleError, match="selection: uniform"):
        plan(base, data, "fedkseed_pro", *MASKED)


def test_the_page_of_capabilities_says_what_the_code_does():
    """Kills: a table kept by hand. Its rows are what `matrix` makes, in the same order."""
    page = (Path(__file__).parents[2] / "docs" / "secure_aggregation.md").read_text(encoding="utf-8")
    rows = "\n".join(f"| `{uplink}` | `{rule}` | {said} |" for uplink, rule, said in matrix())
    assert rows in page, f"docs/secure_aggregation.md should hold:\n{rows}"
