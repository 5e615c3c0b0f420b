"""What is refused before anybody parses it: size, form, rate and number of requests."""

import httpx
import pytest
from door import Door

from federating import plan
from kilotune.core.errors import WireError
from kilotune.engine.flower.fleet import RefusedError, _bounded
from kilotune.engine.flower.gate import BURST, HEADER_BYTES, PULL, RATE, SMALL
from kilotune.engine.flower.limits import ENVELOPE, LARGEST, Limits, limits_of
from kilotune.engine.flower.messages import MAX_FACTS, Reply, Request, decode_reply
from kilotune.engine.flower.traffic import PER_CLIENT, STRANGERS, Meter, Wire
from sealing import Ends, from_wire


@pytest.fixture
def door(tmp_path):
    made = Door(tmp_path)
    yield made
    made.close()


def test_a_body_larger_than_the_recipe_needs_is_refused_unread(door):
    """Kills: limits after parsing; one limit for all calls; trusting the length that was said."""
    assert door.knock(bytes(1000)) == 200
    assert door.knock(bytes(1001)) == 413
    assert door.knock(bytes(SMALL + 1), path=PULL) == 413
    assert door.knock(bytes(900), length=10) is None
    assert door.read == [bytes(1000)]


@pytest.mark.parametrize(
    "changes, status",
    [
        ({"length": b""}, 411),
        ({"length": "-1"}, 411),
        ({"length": "1e3"}, 411),
        ({"length": "9" * 13}, 411),
        ({"headers": [(b"content-encoding", b"gzip")]}, 415),
        ({"headers": [(b"transfer-encoding", b"chunked")]}, 415),
        ({"headers": [(b"x", b"y" * HEADER_BYTES)]}, 431),
        ({"headers": [(b"x", b"y")] * 30}, 431),
        ({"method": "GET"}, 403),
        ({"path": "/v1/control/start-run"}, 403),
        ({"certificate": None}, 403),
        ({"certificate": "bert"}, 403),
        ({"name": "bert"}, 403),
        ({"headers": [(b"flwr-public-key", b"second")]}, 403),
    ],
)
def test_other_forms_of_a_request_are_refused_unread(door, changes, status):
    """Kills: compressed bodies; lengths read by another rule; a header given twice; a certificate of somebody else."""
    assert door.knock(b"x", **changes) == status
    assert door.read == []
    assert door.knock(b"x") == 200


def test_one_key_has_a_rate_and_leaves_the_others_theirs(door):
    """Kills: a client that keeps the server busy; one budget for all; a budget that never recovers."""
    statuses = [door.knock() for _ in range(int(BURST) + 5)]
    assert statuses == [200] * int(BURST) + [429] * 5
    assert door.knock(name="bert", certificate="bert") == 200
    door.now += 3 / RATE
    assert [door.knock() for _ in range(4)] == [200] * 3 + [429]


def test_connections_of_strangers_and_of_one_client_are_limited():
    """Kills: connections that wait for ever before they say who they are; one client that takes all places."""
    meter, gone = Meter(lambda name: None), []
    for port in range(STRANGERS + 2):
        meter.add(port, Wire(lambda port=port: gone.append(port)))
    assert gone == [0, 0, 1]  # the oldest is told again until it is closed
    meter = Meter(lambda name: None)
    wires = [Wire(lambda port=port: gone.append(port)) for port in range(10, 10 + PER_CLIENT + 1)]
    gone.clear()
    for port, wire in enumerate(wires, 10):
        meter.add(port, wire)
        meter.enter(wire, "anna")
    assert gone == [10]


@pytest.mark.parametrize(
    "recipe, up",
    [("kilotune", 25 + 2 + 64 // 2), ("fedkseed", 10 + 6 * 2), ("fedavg_lora", None)],
)
def test_limits_follow_from_the_recipe(base, data, recipe, up):
    """Kills: one generous limit for every protocol; a limit an honest message does not keep."""
    settings = ["basis.size=64"] if recipe != "fedavg_lora" else []
    made = plan(base, data, recipe, *settings)
    numel = 64 if made.basis is not None else 1000
    limits = limits_of(made, {"coords": (numel,)}, 3)
    assert limits.reply("train") == (17 + 2 * numel if up is None else up)
    assert {kind: limits.reply(kind) for kind in ("hello", "evaluate", "finish", "other")} == dict.fromkeys(
        ("hello", "evaluate", "finish", "other"), 0
    )
    assert limits.push("train") == limits.reply("train") + ENVELOPE
    assert limits.push(None) == max(limits.up.values()) + ENVELOPE
    assert limits.pull() <= LARGEST


@pytest.mark.parametrize(
    "headers, fine",
    [
        ({"content-length": "100"}, True),
        ({"content-length": "101"}, False),
        ({}, False),
        ({"content-length": "1_0"}, False),
        ({"content-length": "10", "content-encoding": "gzip"}, False),
        ({"transfer-encoding": "chunked"}, False),
    ],
)
def test_a_client_reads_no_answer_that_is_larger_than_its_recipe_needs(headers, fine):
    """Kills: a server that fills a client's memory; a compressed answer that grows."""
    response = httpx.Response(200, headers=headers, stream=httpx.ByteStream(b""))
    if fine:
        _bounded(response, 100)
    else:
        with pytest.raises(RefusedError, match="the recipe needs 100 at most"):
            _bounded(response, 100)


def test_a_client_does_not_send_what_would_be_refused(tmp_path):
    """Kills: a client that is cut off at the gate again and again and never says why."""
    ends = Ends(tmp_path, "anna")
    ends.posts["anna"]._limits = Limits({"train": 10})
    assert ends.round_trip("anna", Request("train", {}, (bytes(10),))).payloads == (bytes(10),)
    reply = ends.round_trip("anna", Request("train", {}, (bytes(11),)))
    assert (reply.error, reply.payloads) == ("reply cannot be sent: 11 bytes, the recipe needs 10 at most", ())


def test_facts_are_few_and_short(tmp_path):
    """Kills: a message within its size that costs much memory as objects."""
    ends = Ends(tmp_path, "anna")
    many = Reply({f"fact{number}": number for number in range(MAX_FACTS + 10)})
    long = Reply({"text": "x" * 5000})
    for number, (reply, complaint) in enumerate(((many, "facts at most"), (long, "longer than"))):
        ends._handlers["anna"] = lambda request, reply=reply: reply
        raw = ends.reply("anna", ends.request("anna", Request("train", {"round": number})))
        with pytest.raises(WireError, match=complaint):
            decode_reply(from_wire(raw))
