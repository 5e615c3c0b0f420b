"""Ten thousand altered messages: none crashes or hangs a server or a client, and none counts.

A sixteenth of them runs with the fast tests, the rest with those marked `processes`. Payloads themselves are altered in
tests/contract/test_codec.py, for every codec.
"""

import json
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from door import Door
from flwr.app import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kilotune.core.errors import FederationError, RunError, WireError
from kilotune.engine.flower.client import serve
from kilotune.engine.flower.gate import CALLS, PUSH
from kilotune.engine.flower.keys import key_id, read_join_file
from kilotune.engine.flower.limits import Limits
from kilotune.engine.flower.messages import Reply, Request, decode_request, seal_of
from kilotune.engine.flower.server import start_server
from kilotune.engine.rounds.identity import HEADS, read_heads
from kilotune.engine.rounds.ledger import LEDGER, Ledger
from sealing import Ends, ask, federation, from_wire, history, to_wire

BODY = {"round": 3, "rounds": 0, "head": "", "recipe_id": "ab" * 8, "progress": 0.25, "last": True, "blank": ""}
TRAIN = Request("train", BODY, (b"payload of a round", b"", b"\0" * 40))
ANSWER = Reply({"round": 0, "head": "", "loss": 1.5, "num_examples": 4}, (b"payload of a client",))
FAST = pytest.param("fast", id="fast")
REST = pytest.param("rest", marks=pytest.mark.processes, id="rest")


def many(size: str, fast: int, rest: int = 0) -> Any:
    """Hypothesis settings for so many examples."""
    count = fast if size == "fast" else rest
    return settings(
        max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
    )


def attack_messages(raw: bytes, size: str, check: Callable[[Message], None]) -> None:
    """`check` every alteration that Flower can read; what it cannot read never comes to us (an error 500 at the
    server, AwayError at the client)."""

    @many(size, 200, 2800)
    @given(altered(raw))
    def attack(wrong: bytes) -> None:
        try:
            message = from_wire(wrong)
        except Exception:
            return
        check(message)

    attack()


def altered(raw: bytes) -> st.SearchStrategy[bytes]:
    """The message with some bytes changed, cut out or put in, or something else altogether."""
    place = st.integers(0, max(len(raw) - 1, 0))
    change = st.tuples(place, st.integers(0, 3), st.binary(max_size=6))
    return st.one_of(
        st.lists(change, min_size=1, max_size=5).map(lambda changes: spoiled(raw, changes)),
        st.binary(max_size=200),
        st.tuples(place, place).map(lambda ends: raw[min(ends) : max(ends)]),
    )


def spoiled(raw: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for place, length, content in changes:
        raw = raw[:place] + content + raw[place + length :]
    return raw


@pytest.fixture
def door(tmp_path):
    made = Door(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> Ends:
    return Ends(tmp_path_factory.mktemp("fuzz"), "anna", handlers={"anna": lambda request: ANSWER})


@pytest.mark.parametrize("size", [FAST, REST])
def test_no_altered_request_reaches_a_client(ends, size):
    """Kills: any exception from foreign bytes at a client; a changed byte that passes."""
    raw = ends.request("anna", TRAIN)

    def check(message: Message) -> None:
        before = len(ends.handled)
        answer = ends.posts["anna"].answer(message)
        assert answer.fatal is None
        if len(ends.handled) > before or answer.said is not None:
            assert decode_request(message) == TRAIN
            assert seal_of(message) == seal_of(from_wire(raw))

    attack_messages(raw, size, check)


@pytest.mark.parametrize("size", [FAST, REST])
def test_no_altered_reply_reaches_a_server(ends, size):
    """Kills: any exception but WireError from foreign bytes at a server; a changed byte that counts."""
    raw = ends.reply("anna", ends.request("anna", Request("evaluate", BODY)), sent=False)
    asked = dict(ends.desk._open)

    def check(message: Message) -> None:
        ends.desk._open, ends.desk._answered = dict(asked), {}
        try:
            reply = ends.admit("anna", to_wire(message))
        except WireError:
            return
        assert reply == ANSWER

    attack_messages(raw, size, check)


@pytest.mark.parametrize("size", [FAST, REST])
def test_altered_join_files_are_one_clear_line(ends, tmp_path, size):
    """Kills: tracebacks of JSON or of cryptography; half a join file."""
    raw = ends.keys.join_path("anna").read_bytes()
    path = tmp_path / "x.join"

    @many(size, 75, 675)
    @given(altered(raw))
    def attack(wrong: bytes) -> None:
        path.write_bytes(wrong)
        try:
            join = read_join_file(path)
        except FederationError as error:
            assert str(error).startswith(str(path))
            return
        assert join.certificate is not None or json.loads(wrong)["insecure"] is True

    attack()


@pytest.mark.parametrize("size", [FAST, REST])
def test_altered_memories_and_ledgers_are_refused_or_the_same(tmp_path, size):
    """Kills: tracebacks from files on disk; a line that changed and still counts."""
    ends = federation(tmp_path, "anna")
    ledger = Ledger.open(tmp_path / "run", history().header)
    for number in range(2):
        ledger.append(5, b"payload %d" % number, ())
        ends.round_trip("anna", ask(ledger, number + 1))
    cases = [
        (tmp_path / "anna" / HEADS, lambda: read_heads(tmp_path / "anna").links.items()),
        (tmp_path / "run" / LEDGER, lambda: enumerate(Ledger.load(tmp_path / "run").records)),
    ]
    for path, load in cases:
        raw = path.read_bytes()
        _attack_file(path, raw, load, size)
        path.write_bytes(raw)
    assert read_heads(tmp_path / "anna").rounds == len(Ledger.load(tmp_path / "run")) == 2


def _attack_file(path: Path, raw: bytes, load: Callable[[], Any], size: str) -> None:
    whole = dict(load())

    @many(size, 75, 675)
    @given(altered(raw))
    def attack(wrong: bytes) -> None:
        path.write_bytes(wrong)
        try:
            found = dict(load())
        except (WireError, RunError):
            return
        assert found.items() <= whole.items()

    attack()


@pytest.mark.parametrize("size", [FAST, REST])
def test_the_gate_answers_every_request_and_lets_in_only_whole_ones(door, size):
    """Kills: an exception from a header; a body read beyond what it was said to be; a call that is none."""
    names = st.sampled_from([b"flwr-public-key", b"content-length", b"content-encoding", b"expect", b"x"])
    own = key_id(door.keys.clients["anna"]).encode()
    values = st.sampled_from([own, b"10", b"0", b"-1", b"99999999999999", b"", b"\xff\0", b"1\r\n"])

    @many(size, 125, 1275)
    @given(
        st.lists(st.tuples(names, values), max_size=3),
        st.integers(0, 1200),
        st.sampled_from([*sorted(CALLS), "", "/", "/v1/fleet/", "*", "/v1/fleet/push-messages/é"]),
        st.integers(0, 2000),
    )
    def attack(headers, size, path, length) -> None:
        door.now += 1.0
        door.read.clear()
        status = door.knock(bytes(size), path=path, headers=headers, length=length)
        assert status in (None, 200, 403, 411, 413, 415, 431)
        if door.read:
            assert path in CALLS
            assert len(door.read[0]) <= length

    attack()
    assert door.knock(b"fine", path=PUSH) == 200


@pytest.mark.processes
def test_a_server_that_was_attacked_still_serves(tmp_path):
    """Kills: a listener that one bad handshake, header or message stops; memory or connections that are never freed."""
    keys = Ends(tmp_path, "anna").keys
    exchange = start_server(keys, "127.0.0.1", 0, limits=Limits({}, other=1000))
    host, port = exchange.address.split(":")
    join = replace(read_join_file(keys.join_path("anna")), server=exchange.address)
    (tmp_path / "pair.pem").write_bytes(join.key + join.certificate)
    trust = ssl.create_default_context(cadata=join.ca.decode())
    trust.load_cert_chain(tmp_path / "pair.pem")
    head = f"POST {PUSH} HTTP/1.1\r\nhost: x\r\nflwr-public-key: {key_id(keys.clients['anna'])}\r\n"
    request = head.encode() + b"content-type: application/protobuf\r\ncontent-length: 20\r\n\r\n" + bytes(20)

    def throw(raw: bytes, inside: bool) -> None:
        with socket.create_connection((host, int(port)), timeout=30) as plain:
            try:
                stream = trust.wrap_socket(plain, server_hostname=host) if inside else plain
                stream.sendall(raw)
                stream.settimeout(0.01)
                stream.recv(4096)
            except OSError:
                return

    @many("fast", 600)
    @given(altered(request), st.booleans())
    def attack(raw: bytes, inside: bool) -> None:
        throw(raw, inside)

    stop = threading.Event()
    try:
        attack()
        thread = threading.Thread(
            target=serve, args=(join, lambda request: Reply({"fine": True}), 30.0, lambda text: None, stop)
        )
        thread.start()
        assert exchange.wait_for(1, 30) == ["anna"]
        assert list(exchange.exchange({"anna": Request("finish")}, 30)) == [("anna", Reply({"fine": True}))]
        thread.join(30)
    finally:
        stop.set()
        exchange.close()
