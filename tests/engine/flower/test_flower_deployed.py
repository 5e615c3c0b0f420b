"""A server and clients in their own processes, over TLS on loopback."""

import dataclasses
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from flwr.proto.fleet_pb2 import DeactivateNodeRequest

import kilotune
from kilotune.core.errors import FederationError
from kilotune.engine.flower.client import serve
from kilotune.engine.flower.fleet import FleetLink
from kilotune.engine.flower.keys import init_server, key_id, load_server_keys, read_join_file, revoke, rotate
from kilotune.engine.flower.limits import Limits
from kilotune.engine.flower.messages import Reply, Request
from kilotune.engine.flower.server import start_server
from ports import free_port

HERE = Path(__file__).parent
NAMES = ["anna", "bert", "cleo"]
UP, DOWN = 4300, 8400

pytestmark = pytest.mark.processes


class Child:
    """A process of the test; its stdout is read line by line, which is how the tests wait for it."""

    def __init__(self, script: str, *args: object) -> None:
        env = os.environ | {"PYTHONPATH": str(Path(kilotune.__file__).parents[1])}
        command = [sys.executable, str(HERE / script), *map(str, args)]
        self.process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=env)

    def line(self, starts: str) -> str:
        """The next line that starts so."""
        for line in self.process.stdout:
            if line.startswith(starts):
                return line.strip()
        raise AssertionError(f"the process ended (code {self.process.wait()}) before it said {starts!r}")

    def say(self, text: str) -> None:
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start():
    """Start a process that is killed at the end of the test, whatever happens."""
    children = []

    def start_child(script, *args):
        children.append(Child(script, *args))
        return children[-1]

    yield start_child
    for child in children:
        child.kill()
        child.process.stdin.close()
        child.process.stdout.close()


@pytest.fixture
def server(tmp_path):
    """A server in this process with three enrolled clients."""
    events = []
    keys = init_server(tmp_path / "keys", "127.0.0.1", free_port(), NAMES)
    exchange = start_server(keys, keys.host, keys.port, events.append)
    exchange.keys, exchange.events = keys, events
    yield exchange
    exchange.close()


def test_three_processes_answer_and_every_byte_is_counted(server, start):
    """Kills: replies mixed up between clients; a model reloaded per message; bytes of TLS or headers not counted."""
    children = [start("echo_client.py", server.keys.join_path(name)) for name in NAMES]
    assert server.wait_for(3, 60) == NAMES
    seen = [server.traffic()]
    for number in range(5):
        payloads = {name: bytes([number]) + name.encode() * (DOWN // 4) for name in NAMES}
        requests = {n: Request("train", {"round": number, "size": UP}, (payloads[n],)) for n in NAMES}
        replies = dict(server.exchange(requests, 60))
        assert {n: r.payloads for n, r in replies.items()} == {n: (payloads[n][::-1][:UP],) for n in NAMES}
        assert {n: r.body for n, r in replies.items()} == {key: {"calls": number + 1, "round": number} for key in NAMES}
        assert [r.error for r in replies.values()] == [None] * 3
    seen.append(server.traffic())
    for name in NAMES:
        added = seen[1][name] - seen[0][name]
        down = 5 * (4 * (DOWN // 4) + 1)
        assert 5 * UP < added.up_bytes < 5 * (UP + 1200)
        assert down < added.down_bytes < down + 5 * 800
        # A handshake and a join; the poll that is being held has not been named yet.
        assert 500 < seen[1][name].idle_up_bytes < 2000
        assert 1000 < seen[1][name].idle_down_bytes < 3000
    big = os.urandom(3_000_000)
    reply = dict(server.exchange({"bert": Request("evaluate", {"size": len(big)}, (big,))}, 60))["bert"]
    assert reply.payloads == (big[::-1],)
    reply = dict(server.exchange({"cleo": Request("train", {"fail": True})}, 60))["cleo"]
    assert reply.error == "ValueError: asked to fail"
    assert list(dict(server.exchange(dict.fromkeys(NAMES, Request("finish")), 60))) and [
        child.line("finished") for child in children
    ]
    assert [child.process.wait(30) for child in children] == [0, 0, 0]
    assert server.roster() == []


def test_a_killed_client_that_comes_back_is_asked_again(server, start):
    """Kills: waiting for the dead process; refusing its second join; a request lost once it was delivered."""
    first = start("echo_client.py", server.keys.join_path("anna"))
    assert server.wait_for(1, 60) == ["anna"]
    replies = server.exchange({"anna": Request("train", {"round": 7, "gate": True})}, 90)
    first.line("handling train 7")
    first.kill()
    second = start("echo_client.py", server.keys.join_path("anna"))
    second.say("go")
    assert list(replies) == [("anna", Reply({"calls": 1, "round": 7}, (b"",)))]
    assert [e for e in server.events if e.startswith("anna")] == ["anna joined", "anna left", "anna joined"]


def test_resident_clients_outlive_a_killed_server_and_train_once(tmp_path, start):
    """Kills: clients that end with the server; an old session used against a new server; a round trained twice."""
    keys = init_server(tmp_path, "127.0.0.1", free_port(), NAMES[:2])
    clients = [start("echo_client.py", keys.join_path(name)) for name in NAMES[:2]]
    server = start("echo_server.py", tmp_path)
    server.line("listening")
    server.say(json.dumps({"round": 0}))
    assert json.loads(server.line("{")) == {key: {"calls": 1, "round": 0} for key in NAMES[:2]}
    server.say(json.dumps({"round": 1, "gate": True}))
    for client in clients:
        client.line("handling train 1")
    server.kill()
    again = start("echo_server.py", tmp_path)
    again.line("listening")
    again.say(json.dumps({"round": 1, "gate": True}))
    for client in clients:
        client.say("go")
    assert json.loads(again.line("{")) == {key: {"calls": 2, "round": 1} for key in NAMES[:2]}
    again.say(json.dumps({"round": 2}))
    assert json.loads(again.line("{")) == {key: {"calls": 3, "round": 2} for key in NAMES[:2]}


def joined_to(server, join):
    return dataclasses.replace(join, server=server.address)


def test_a_stranger_is_refused_in_one_line(server, tmp_path):
    """Kills: accepting any key; trusting any certificate; retrying for ever what cannot work."""
    other = init_server(tmp_path / "other", "127.0.0.1", 1, ["anna"])
    theirs = read_join_file(other.join_path("anna"))
    with pytest.raises(FederationError, match="certificate that the join file of 'anna' does not trust"):
        serve(joined_to(server, theirs), lambda request: Reply(), 30.0)
    late = init_server(server.keys.folder, "127.0.0.1", server.keys.port, ["dora"])  # after the server has started
    with pytest.raises(FederationError, match="does not know the key of 'dora'"):
        serve(read_join_file(late.join_path("dora")), lambda request: Reply(), 30.0)
    assert server.roster() == []


def test_a_server_with_a_good_certificate_for_another_key_is_refused(server):
    """Kills: trusting whatever the federation's CA has signed: who holds the CA could replace the server unseen."""
    mine = read_join_file(server.keys.join_path("anna"))
    other = dataclasses.replace(mine, server_key=server.keys.clients["bert"])
    with pytest.raises(FederationError, match="certificate that the join file of 'anna' does not trust"):
        serve(other, lambda request: Reply(), 30.0)


def test_without_a_certificate_of_the_federation_nothing_is_answered(server, tmp_path):
    """Kills: TLS that proves the server only; a certificate of any CA."""
    mine = read_join_file(server.keys.join_path("anna"))
    theirs = read_join_file(init_server(tmp_path / "other", "127.0.0.1", 1, ["anna"]).join_path("anna"))
    for pair in (None, theirs):
        trust = ssl.create_default_context(cadata=mine.ca.decode())
        if pair is not None:
            (tmp_path / "pair.pem").write_bytes(pair.key + pair.certificate)
            trust.load_cert_chain(tmp_path / "pair.pem")
        with httpx.Client(verify=trust, trust_env=False) as client, pytest.raises(httpx.TransportError):
            client.post(f"https://{server.address}/v1/fleet/pull-messages")
    foreign = dataclasses.replace(mine, key=theirs.key, certificate=theirs.certificate)
    with pytest.raises(FederationError, match="did not answer"):
        serve(foreign, lambda request: Reply(), 0.0)


def test_a_stolen_name_without_its_private_key_is_refused(server, monkeypatch):
    """Kills: taking the key's name in the header for proof; a certificate of one client that lets in another."""
    thief = read_join_file(server.keys.join_path("bert"))
    monkeypatch.setattr("kilotune.engine.flower.fleet.key_id", lambda public: key_id(server.keys.clients["anna"]))
    with pytest.raises(FederationError, match="does not know the key of 'bert'"):
        serve(joined_to(server, thief), lambda request: Reply(), 30.0)
    assert server.roster() == []


def test_flowers_signature_is_still_asked_for_where_there_is_no_tls(tmp_path, monkeypatch):
    """Kills: an insecure federation in which a name is enough."""
    keys = init_server(tmp_path, "127.0.0.1", free_port(), ["anna", "bert"], insecure=True)
    exchange = start_server(keys, keys.host, keys.port)
    try:
        thief = read_join_file(keys.join_path("bert"))
        monkeypatch.setattr("kilotune.engine.flower.fleet.key_id", lambda public: key_id(keys.clients["anna"]))
        with pytest.raises(FederationError, match="did not accept the signature of 'bert'"):
            serve(thief, lambda request: Reply(), 30.0)
    finally:
        exchange.close()


def test_only_the_calls_of_a_client_are_answered(server, tmp_path):
    """Kills: leaving Flower's unauthenticated control API, its docs or self-registration open on the same port."""
    join = read_join_file(server.keys.join_path("anna"))
    (tmp_path / "pair.pem").write_bytes(join.key + join.certificate)
    trust = ssl.create_default_context(cadata=join.ca.decode())
    trust.load_cert_chain(tmp_path / "pair.pem")
    known = {"flwr-public-key": key_id(server.keys.clients["anna"])}
    paths = ["control/list-runs", "control/start-run", "runtime/acquire-task", "fleet/register-node", "fleet/get-fab"]
    with httpx.Client(verify=trust, trust_env=False, base_url=f"https://{server.address}") as client:
        for path in paths:
            answer = client.post(f"/v1/{path}", headers=known | {"content-type": "application/protobuf"})
            assert answer.status_code == 403, path
        assert client.get("/docs", headers=known).status_code == 403
        beat = "/v1/fleet/send-node-heartbeat"
        unsigned = known | {"content-type": "application/protobuf"}
        assert client.post(beat, headers=unsigned).status_code == 401
        other = {"flwr-public-key": key_id(server.keys.clients["bert"])}
        assert client.post(beat, headers=unsigned | other).status_code == 403
        push = "/v1/fleet/push-messages"
        assert client.post(push, headers=unsigned, content=iter([b"chunks"])).status_code == 415
        assert client.post(push, headers=unsigned | {"content-encoding": "gzip"}, content=b"x").status_code == 415
        assert client.post(beat, headers=unsigned | {"x-long": "x" * 9000}).status_code in (400, 431)
    host, port = server.address.rsplit(":", 1)
    head = "".join(f"{name}: {value}\r\n" for name, value in unsigned.items())
    with socket.create_connection((host, int(port))) as plain, trust.wrap_socket(plain, server_hostname=host) as line:
        line.sendall(f"POST {push} HTTP/1.1\r\nhost: {host}\r\n{head}content-length: {65 << 20}\r\n\r\n".encode())
        assert line.recv(64).startswith(b"HTTP/1.1 413 ")  # before a byte of the body was sent


def test_revoked_and_rotated_keys_are_refused_after_a_restart(server):
    """Kills: clients that stay in although the owner removed them; an old key beside the new one."""
    keys, join = server.keys, read_join_file(server.keys.join_path("bert"))
    server.close()
    revoke(keys.folder, "bert")
    old = read_join_file(keys.join_path("cleo"))
    new = read_join_file(rotate(keys.folder, "cleo").join_path("cleo"))
    again = start_server(load_server_keys(keys.folder), keys.host, keys.port)
    try:
        for out in (join, old):
            with pytest.raises(FederationError, match=f"does not know the key of '{out.client}'"):
                serve(out, lambda request: Reply(), 30.0)
        thread = threading.Thread(target=serve, args=(new, lambda request: Reply(), 30.0))
        thread.start()
        assert again.wait_for(1, 30) == ["cleo"]
        assert list(again.exchange({"cleo": Request("finish")}, 30)) == [("cleo", Reply())]
        thread.join(30)
    finally:
        again.close()


def test_a_taken_port_is_one_clear_line(server):
    """Kills: a traceback from the event loop; two servers sharing a port."""
    with pytest.raises(FederationError) as caught:
        start_server(server.keys, "127.0.0.1", server.keys.port)
    assert str(caught.value).startswith(f"port {server.keys.port} on 127.0.0.1 is taken. Choose another with")


def test_an_absent_server_is_one_clear_line(tmp_path):
    """Kills: waiting for ever at the start; a traceback from the HTTP library."""
    port = free_port()
    join = read_join_file(init_server(tmp_path, "127.0.0.1", port, ["anna"]).join_path("anna"))
    with pytest.raises(FederationError, match=f"server 127.0.0.1:{port} did not answer within 0.1 s") as caught:
        serve(join, lambda request: Reply(), 0.1)
    assert "\n" not in str(caught.value)


def test_missing_the_deadline_leaves_a_client_out_and_its_late_answer_too(server):
    """Kills: waiting past the deadline; a late answer taken for the next round's."""
    release, stop, events = threading.Event(), threading.Event(), []

    def handle(request):
        if request.body["round"] == 0:
            release.wait(30)
        return Reply({"round": request.body["round"]})

    args = (read_join_file(server.keys.join_path("cleo")), handle, 30.0, events.append, stop)
    thread = threading.Thread(target=serve, args=args)
    thread.start()
    try:
        assert server.wait_for(1, 30) == ["cleo"]
        requests = {"cleo": Request("train", {"round": 0}), "anna": Request("train", {"round": 0})}
        assert list(server.exchange(requests, 0.5)) == []
        release.set()
        requests = {"cleo": Request("train", {"round": 1})}
        assert list(server.exchange(requests, 30)) == [("cleo", Reply({"round": 1}))]
    finally:
        release.set()
        stop.set()
        thread.join(30)
    assert not thread.is_alive()
    assert server.roster() == []
    assert server._link.grid.state.num_message_ins() == 0  # what nobody answered is not kept either


def test_a_poll_that_comes_after_its_client_has_left_does_not_bring_it_back(server):
    """Kills: a client counted as there, or given a request, because a poll of it was overtaken by its leave."""
    link = FleetLink(read_join_file(server.keys.join_path("cleo")), Limits())
    try:
        link.activate()
        assert server.roster() == ["cleo"]
        link._client.DeactivateNode(DeactivateNodeRequest(node_id=link._node.node_id))
        assert list(server.exchange({"cleo": Request("train", {"round": 0})}, 0.1)) == []
        link.heartbeat()
        assert server._link.grid.state.get_message_ins(link._node.node_id, 1) == []
        assert server.roster() == []
        link.activate()
        assert server.roster() == ["cleo"]
    finally:
        link.leave()


def test_an_insecure_federation_works_when_asked_for(tmp_path):
    """Kills: TLS settings that leak into the plain mode; a plain client let into a server with TLS."""
    keys = init_server(tmp_path, "127.0.0.1", free_port(), ["anna"], insecure=True)
    exchange = start_server(keys, keys.host, keys.port)
    stop = threading.Event()
    args = (
        read_join_file(keys.join_path("anna")),
        lambda request: Reply({"plain": True}),
        30.0,
        lambda text: None,
        stop,
    )
    thread = threading.Thread(target=serve, args=args)
    thread.start()
    try:
        exchange.wait_for(1, 30)
        assert list(exchange.exchange({"anna": Request("hello")}, 30)) == [("anna", Reply({"plain": True}))]
        assert list(exchange.exchange({"anna": Request("finish")}, 30)) == [("anna", Reply({"plain": True}))]
        thread.join(30)
        assert not thread.is_alive()
    finally:
        stop.set()
        exchange.close()
