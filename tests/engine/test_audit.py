"""The audit: an honest run adds up to the bit; whatever is altered is found and its round named."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from federating import plan, quiet
from kilotune.core.errors import WireError
from kilotune.engine.afterwards.audit import audit
from kilotune.engine.afterwards.withdraw import withdraw
from kilotune.engine.model.base import load_base
from kilotune.engine.rounds.book import append_entry, read_entries
from kilotune.engine.rounds.ledger import LEDGER, Ledger
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.session import federate
from lying import prepared, times

SMALL = ("local_steps=1", "batch_size=2", "evaluation.limit=3")
SETTINGS = {
    "kilotune": ("basis.refresh=run",),  # what quantization lost goes on to the next round
    "kilotune_zeroth": ("optimizer={name: sgd, lr: 0.002}",),
    "fedavg_lora": ("server_optimizer={name: adamw, lr: 0.01}",),
    "ferret": (),
    "robust_coefficients": ("aggregation={name: geometric_median, weighting: equal}",),  # a choice among three clients
    "mixed": (),
}


@pytest.mark.parametrize("recipe", SETTINGS)
def test_every_round_of_an_honest_run_comes_out_again_to_the_bit(base, data, tmp_path, recipe):
    """Kills: an audit that forgets what codec, server optimizer, rule or guard remember; one that knows only sums."""
    lies = {} if recipe in ("ferret", "fedavg_lora") else {"cyd": times(40.0)}
    prepared(plan(base, data, recipe, *SMALL, *SETTINGS[recipe]), tmp_path, lies).run()
    found = audit(tmp_path, None, quiet)
    assert found["problems"] == []
    assert [entry["recombines"] for entry in found["rounds"]] == [True, True]
    if lies and recipe != "mixed":
        assert any(part.get("scale", 1.0) != 1.0 or "limit" in part for e in found["rounds"] for part in e["accepted"])


def test_a_late_answer_counts_again_for_what_it_counted(base, data, tmp_path):
    """Kills: an audit that takes every answer for one in time."""
    recipe = plan(base, data, "kilotune", *SMALL, "basis.refresh=run", "staleness.max=1")
    genesis: list[str] = []

    def late(replica, request, reply):
        facts = {"round": 0, "head": genesis[0]} if request.body["round"] == 2 else {}
        return replace(reply, body={**reply.body, **facts})

    federation = prepared(recipe, tmp_path, {"bob": late})
    genesis.append(federation.ledger.header.hash)
    federation.run()
    found = audit(tmp_path, None, quiet)
    assert found["problems"] == []
    weights = {part["client"]: part["weight"] for part in found["rounds"][1]["accepted"]}
    assert weights["bob"] == pytest.approx(2**-0.5 * weights["ada"])


@pytest.fixture(scope="module")
def run(base, data, tmp_path_factory):
    """Three rounds of three clients."""
    folder = tmp_path_factory.mktemp("audited") / "run"
    federate(plan(base, data, "kilotune", "rounds=3", *SMALL), folder, quiet)
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def test_the_table_says_what_the_files_say(run, base, data):
    """Kills: figures of another round; weights after the last round for all."""
    found = audit(run, None, quiet)
    ledger = Ledger.load(run)
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rounds = {event["round"]: event for event in events if event["event"] == "round"}
    replica = Replica(load_base(str(base)), plan(base, data, "kilotune"))
    assert found["verified"]
    for record, payload in ledger.since(0):
        entry = found["rounds"][record.round - 1]
        replica.apply(record.round, payload)
        assert entry["digest"] == replica.digest()
        assert entry["head"] == record.hash
        assert entry["up_bytes"] == rounds[record.round]["up_bytes"] == sum(p["bytes"] for p in entry["accepted"])
        assert entry["down_bytes"] == rounds[record.round]["down_bytes"]
        assert [part["weight"] for part in entry["accepted"]] == [part.weight for part in record.contributions]
        assert (entry["refused"], entry["epsilon"], entry["clipped_norms"]) == ([], None, 0.0)


def test_who_was_refused_and_why_is_in_its_round(base, data, tmp_path):
    federation = prepared(plan(base, data, "kilotune", *SMALL), tmp_path, {"bob": times(float("1e30"))})
    events: list[dict] = []
    federation.emit = events.append
    federation._roster._emit = events.append
    federation.run()
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    refused = [entry["refused"] for entry in audit(tmp_path, None, quiet)["rounds"]]
    told = [[(item["client"], item["why"]) for item in e["refused"]] for e in events if e["event"] == "guard"]
    assert [[(r["client"], r["why"]) for r in entry] for entry in refused] == told


@pytest.mark.parametrize("place", ["payload", "weight", "digest"])
def test_a_broken_chain_is_refused_with_its_round(copy, place):
    """Kills: an audit of rounds that do not belong together."""
    if place == "payload":
        path = copy / "payloads" / "00002.bin"
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(bytes(raw))
    else:
        lines = (copy / LEDGER).read_text().splitlines()
        record = json.loads(lines[2])
        if place == "weight":
            record["contributions"][1]["weight"] += 0.25
        else:
            record["payload_sha256"] = "00" * 32
        lines[2] = json.dumps(record)
        (copy / LEDGER).write_text("\n".join(lines) + "\n")
    with pytest.raises(WireError, match="round 2 does not follow"):
        audit(copy, None, quiet)


def test_an_altered_contribution_is_found_and_named(copy):
    """Kills: a checksum anyone can make again in place of the ledger's hash."""
    path = copy / "contributions" / "00002.bin"
    entries = [entry for entry, _ in read_entries(path)]
    path.unlink()
    for entry in entries:
        payload = bytearray(entry.payload)
        payload[-1] ^= entry.client == "bob"
        append_entry(path, type(entry)(entry.client, entry.head, entry.facts, bytes(payload)))
    (problem,) = audit(copy, None, quiet)["problems"]
    assert problem["round"] == 2
    assert "the payload of client 'bob' is another one" in problem["what"]


def rewritten(folder, change) -> None:
    """The ledger with a whole new chain, as only a dishonest server can make it."""
    old = Ledger.load(folder)
    records = [(r.root, payload, r.contributions) for r, payload in old.since(0)]
    (folder / LEDGER).unlink()
    new = Ledger.open(folder, old.header)
    for number, (root, payload, contributions) in enumerate(records, 1):
        new.append(root, *change(number, payload, contributions))


def test_a_server_that_adds_something_of_its_own_is_found(copy):
    """Kills: an audit that believes whatever the chain covers."""

    def change(number, payload, contributions):
        numbers = np.frombuffer(payload, np.uint8).copy()
        numbers[-2] ^= number == 2
        return numbers.tobytes(), contributions

    rewritten(copy, change)
    (problem,) = audit(copy, None, quiet)["problems"]
    assert problem == {"round": 2, "what": "its contributions do not combine to the payload that was committed"}


def test_a_server_that_favours_a_client_is_found(copy):
    def change(number, payload, contributions):
        if number == 3:
            contributions = (replace(contributions[0], scale=0.5), *contributions[1:])
        return payload, contributions

    rewritten(copy, change)
    (problem,) = audit(copy, None, quiet)["problems"]
    assert problem == {"round": 3, "what": "scale of client 'ada': the ledger says 0.5, the rules give 1.0"}


def test_a_run_that_somebody_left_adds_up_as_well(run, tmp_path):
    withdraw(run, "bob", tmp_path / "new", "subtract", None, None, quiet)
    found = audit(tmp_path / "new", None, quiet)
    assert found["problems"] == []
    assert [entry["recombines"] for entry in found["rounds"]] == [True] * 3


def test_what_cannot_be_combined_again_is_said(base, data, run, tmp_path):
    """Kills: a yes where nothing was checked."""
    assert {e["recombines"] for e in audit(run / "final.seed", None, quiet)["rounds"]} == {None}
    federate(plan(base, data, "secure", *SMALL, "rounds=1"), tmp_path / "secure", quiet)
    assert "sums only" in audit(tmp_path / "secure", None, quiet)["rounds"][0]["unchecked"]
    federate(plan(base, data, "kilotune", "keep_contributions=never", "rounds=1", *SMALL), tmp_path / "never", quiet)
    entry = audit(tmp_path / "never", None, quiet)["rounds"][-1]
    assert entry["recombines"] is None
    assert "keep_contributions" in entry["unchecked"]


def test_epsilon_of_each_round_is_told_and_nobody_named(base, data, tmp_path):
    federate(plan(base, data, "private_central", *SMALL, "privacy.clients=3"), tmp_path, quiet)
    rounds = audit(tmp_path, None, quiet)["rounds"]
    assert rounds[0]["epsilon"] < rounds[1]["epsilon"]
    assert [entry["accepted"] for entry in rounds] == [[], []]


def test_contribution_is_the_loss_without_minus_the_loss_with(run, data, tmp_path):
    """Kills: the sign; the loss of a client's share alone; a run that is measured with the rest of another."""
    from kilotune.engine.afterwards.measure import measure

    def loss(folder) -> float:
        return measure(str(folder), str(data), "all", None, 0, 64, None, None, quiet)["overall"]["loss"]

    found = audit(run, None, quiet, str(data))["contribution"]
    assert found["loss"] == pytest.approx(loss(run), abs=1e-6)
    withdraw(run, "cyd", tmp_path / "cyd", "subtract", None, None, quiet)
    assert found["gain"]["cyd"] == pytest.approx(loss(tmp_path / "cyd") - found["loss"], abs=1e-6)
    assert len(found["gain"]) == 3
