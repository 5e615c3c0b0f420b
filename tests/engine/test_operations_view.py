"""RunView against counts taken from the events themselves, and against the summary of the run that emitted them."""

import json
import random
from collections import Counter

import pytest

from federating import plan
from kilotune.engine.operations.runview import REASON_CLASSES, RunView, reason_class
from kilotune.engine.runfolder import RunFolder
from kilotune.engine.session import federate

NAMES = ("ada", "bob", "cyd", "dee")


@pytest.fixture(scope="module")
def watched(base, data, tmp_path_factory):
    """A real federation of three clients: its folder, summary, events, and the view that was fed live."""
    folder, events = tmp_path_factory.mktemp("watched") / "run", []
    recipe = plan(base, data, "kilotune", "rounds=3", "evaluation.every=1")
    view = RunView({}, recipe.recipe.rounds, ("ada", "bob", "cyd"))

    def emit(event):
        events.append(json.loads(json.dumps(event)))
        view.fold(event)

    return folder, federate(recipe, folder, emit), events, view.snapshot()


def test_the_view_of_a_real_run_says_what_its_summary_says(watched):
    """Kills: bytes counted twice or not at all; a head or digest of another moment; quality in another order."""
    _, summary, events, state = watched
    totals = state["totals"]
    rounds = [e for e in events if e["event"] == "round"]
    assert state["round"] == summary["rounds"] == len(state["rounds"]) == 3
    assert state["phase"] == "finishing"  # the recording of the end is not an event of the rounds
    assert totals["answers"] == 9
    assert round(totals["up_bytes"] / totals["answers"], 1) == summary["payload_up_bytes_per_client_round"]
    assert round(totals["down_bytes"] / totals["answers"], 1) == summary["payload_down_bytes_per_client_round"]
    assert totals["round_seconds"] == sum(e["seconds"] for e in rounds)
    assert state["facts"]["ledger head"] == summary["ledger_head"]
    assert [q["loss"] for q in state["quality"]] == [e["overall"]["loss"] for e in events if e["event"] == "evaluation"]
    assert state["quality"][0]["loss"] == summary["eval"]["before"]["loss"]
    assert state["quality"][-1]["loss"] == summary["eval"]["after"]["loss"]
    for name, client in state["clients"].items():
        own = [e for e in events if e["event"] == "client" and e["client"] == name]
        assert (client["status"], client["rounds"]) == ("ok", 3)
        assert client["up_bytes"] == sum(e["up_bytes"] for e in own)
        assert client["examples"] == own[-1]["num_examples"]


def test_a_server_that_goes_on_knows_what_went_before(watched):
    """Kills: counters that restart from zero; clients that look connected before anybody has come."""
    folder, summary, _, live = watched
    view = RunView({}, 3, ("ada", "bob", "cyd"))
    view.resume(RunFolder(folder).events())
    state = view.snapshot()
    for key in ("totals", "rounds", "quality", "refusals", "round", "privacy"):
        assert state[key] == live[key], key
    assert state["facts"]["weights"] == summary["digest"]
    assert state["phase"] == "starting"
    assert {c["status"] for c in state["clients"].values()} == {"away"}


def invented(seed):
    """Rounds in which everything happens, with times; deterministic."""
    draw, clock, events = random.Random(seed), 1000.0, []

    def add(**event):
        nonlocal clock
        clock += 1
        events.append({**event, "time": clock})

    for number in range(1, 9):
        counted = []
        for client in NAMES:
            status = draw.choice(["ok", "ok", "ok", "error", "missing", "refused", "late"])
            event = {"event": "client", "round": number, "client": client}
            if status in ("ok", "late"):
                sent = draw.randrange(100, 5000)
                add(
                    **event,
                    status="ok",
                    up_bytes=sent,
                    num_examples=draw.randrange(9),
                    seconds=draw.random(),
                    loss=7.25,
                )
                if status == "late":  # judged when all were there
                    add(**event, status="refused", why="sends the same payload as bob")
                else:
                    counted.append(sent)
            elif status == "missing":
                add(**event, status="missing")
            else:
                add(**event, status=status, why=draw.choice(["sends numbers that are not finite", "holds base 12"]))
        add(event="weather", round=number, rain=True)
        add(event="guard", round=number, accepted=len(counted), clipped_scalars=number / 16, clipped_norms=0.0)
        counts = {"clients": len(counted), "asked": 4, "up_bytes": sum(counted), "down_bytes": draw.randrange(9000)}
        add(event="round", round=number, **counts, seconds=draw.random(), epsilon=0.5 * number, head=f"{number:064x}")
    add(event="finishing", down_bytes=77)
    return events


@pytest.mark.parametrize("seed", range(5))
def test_every_count_equals_the_count_over_the_events(seed):
    """Kills: an answer that counts although it was refused afterwards; a missing client that counts as heard."""
    events = invented(seed)
    view = RunView({}, 8, NAMES)
    for event in events:
        view.fold(event)
    state = view.snapshot()
    rounds, told = ([e for e in events if e["event"] == kind] for kind in ("round", "client"))
    refused = [e for e in told if e["status"] in ("error", "refused")]
    assert state["totals"] == {
        "up_bytes": sum(e["up_bytes"] for e in rounds),
        "down_bytes": sum(e["down_bytes"] for e in rounds) + 77,
        "answers": sum(e["clients"] for e in rounds),
        "missing": sum(e["status"] == "missing" for e in told),
        "rejected": 0,
        "rounds": 8,
        "round_seconds": pytest.approx(sum(e["seconds"] for e in rounds), abs=1e-12),
        "refusals": dict(sorted(Counter(reason_class(e["why"]) for e in refused).items())),
    }
    for name in NAMES:
        own, client = [e for e in told if e["client"] == name], state["clients"][name]
        last = {number: [e["status"] for e in own if e["round"] == number][-1] for number in range(1, 9)}
        assert client["rounds"] == sum(status == "ok" for status in last.values())
        assert client["status"] == own[-1]["status"]
        assert client["refusals"] == sum(e in refused for e in own)
        assert client["up_bytes"] == sum(e.get("up_bytes", 0) for e in own)
        assert client["last_seen"] == max((e["time"] for e in own if e["status"] != "missing"), default=None)
    assert [r["epsilon"] for r in state["rounds"]] == [0.5 * n for n in range(1, 9)]
    assert state["privacy"] == {"epsilon": 4.0}
    assert state["defences"] == {"clipped_scalars": 0.5, "clipped_norms": 0.0}
    assert [r["why"] for r in state["refusals"]] == [e["why"] for e in refused]


def test_no_loss_of_a_single_client_is_kept():
    """Kills: a page that tells under differential privacy what the protocol hides."""
    view = RunView({}, 8)
    for event in invented(1):
        view.fold(event)
    assert "7.25" not in json.dumps(view.snapshot())


def test_an_unknown_event_changes_nothing_but_the_privacy_spent():
    """Kills: a server that dies of an event that a later version emits; an epsilon that is overlooked."""
    view = RunView({"title": "t"}, 4, NAMES)
    view.fold({"event": "round", "round": 1, "time": 5.0})
    before = view.snapshot()
    view.fold({"event": "shuffled", "round": 9, "client": "eve", "status": "ok", "time": 5.0})
    assert view.snapshot() == before
    view.fold({"event": "privacy", "epsilon": 1.5, "delta": 1e-5, "budget": 8, "time": 5.0})
    assert view.snapshot() == before | {"privacy": {"epsilon": 1.5, "delta": 1e-5, "budget": 8.0}}


def test_a_round_that_changed_nothing_is_a_problem_until_one_does():
    """Kills: a rejected round that looks healthy because its event comes after; a problem that never goes away."""
    view = RunView({}, 4)
    view.fold({"event": "rejected", "round": 1, "why": "the loss would go from 1 to 2, above the gate"})
    view.fold({"event": "round", "round": 1})
    assert view.problem.startswith("round 1 changes nothing")
    assert view.snapshot()["refusals"][0]["reason"] == "gate"
    view.fold({"event": "round", "round": 2})
    assert view.problem == ""


def test_what_a_client_says_is_one_printable_line():
    """Kills: names and reasons that turn text around, move a cursor or fill a page."""
    view = RunView({}, 4)
    view.fold({"event": "client", "client": "e\u202eve\n", "status": "error", "why": "a\x1b[2J" + "b" * 10_000})
    (refusal,) = view.snapshot()["refusals"]
    assert refusal["client"] == "e\ufffdve"
    assert refusal["why"].startswith("a\ufffd[2J")
    assert len(refusal["why"]) == 240
    assert list(view.snapshot()["clients"]) == ["e\ufffdve"]


def test_presence_is_heard_from_the_exchange():
    """Kills: a page that shows a client as connected for ever."""
    view = RunView({}, 4, ("ada", "bob"))
    for text in ("ada joined", "bob joined", "bob left", "eve joined", "waiting for 2 clients"):
        view.fold({"event": "status", "text": text})
    state = view.snapshot()
    assert {name: c["status"] for name, c in state["clients"].items()} == {"ada": "joined", "bob": "away"}
    assert state["activity"] == "waiting for 2 clients"


@pytest.mark.parametrize(
    ("why", "expected"),
    [
        ("client 'a' follows recipe 77ab, the server recipe 3f0c. Use the same recipe file.", "recipe"),
        ("client 'a' has base 12, the server 34. Use the same base model.", "base"),
        ("its signature does not fit: not made by 'a', or altered since", "identity"),
        ("request 7 was answered before: this is a copy or too late", "replay"),
        ("stands at round 3, head 'ab': a stale or foreign answer", "history"),
        ("sends a coefficient of 1e+06, but no loss can give more than 1.2e+04", "bound"),
        ("sends numbers that are not finite", "values"),
        ("coefficients: got 9 bytes, expected a header of 25. The payload is cut.", "payload"),
        ("client 'a' has no training rows.", "rows"),
        ("MemoryError", "other"),
    ],
)
def test_refusals_fall_into_few_classes(why, expected):
    """Kills: one time series per message of a client."""
    assert reason_class(why) == expected
    assert expected in REASON_CLASSES
