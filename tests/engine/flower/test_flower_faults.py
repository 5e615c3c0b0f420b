"""A server and clients over links that throttle, break, stall and lie about the time."""

import dataclasses
import datetime
import threading

import pytest

from faulty import FaultyNetwork
from kilotune.core.errors import FederationError
from kilotune.engine.flower.client import serve
from kilotune.engine.flower.keys import init_server, read_join_file
from kilotune.engine.flower.messages import Reply, Request
from kilotune.engine.flower.server import start_server
from ports import free_port

pytestmark = pytest.mark.processes

NAMES = ["anna", "bert"]
PATIENCE_S = 120


class Clients:
    """Clients in threads of this process; each link of theirs leads through the faulty network."""

    def __init__(self, keys, network) -> None:
        self._keys, self._network = keys, network
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self.calls: list[tuple[str, int]] = []
        self.events: dict[str, list[str]] = {name: [] for name in NAMES}

    def start(self, name: str, link, before=lambda request: None) -> None:
        """`before` runs before a request is answered with the round and 4 kB."""

        def handle(request: Request) -> Reply:
            self.calls.append((name, request.body.get("round", 0)))
            before(request)
            return Reply({"round": request.body.get("round", 0)}, (name.encode() * 1000,))

        join = dataclasses.replace(read_join_file(self._keys.join_path(name)), server=link.address)
        args = (join, handle, PATIENCE_S, self.events[name].append, self._stop)
        self._threads.append(threading.Thread(target=serve, args=args))
        self._threads[-1].start()

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


@pytest.fixture
def place(tmp_path):
    """A server, the network that leads to it, and clients to start."""
    keys = init_server(tmp_path / "keys", "127.0.0.1", free_port(), NAMES)
    exchange = start_server(keys, keys.host, keys.port)
    with FaultyNetwork("127.0.0.1", keys.port) as network:
        clients = Clients(keys, network)
        yield exchange, network, clients
        clients.end()
    exchange.close()


def asked(number: int, *names: str) -> dict[str, Request]:
    return {name: Request("train", {"round": number}, (b"x" * 4000,)) for name in names}


def answer(name: str, number: int) -> tuple[str, Reply]:
    return name, Reply({"round": number}, (name.encode() * 1000,))


def test_a_slow_link_takes_one_handshake_and_every_answer_arrives(place):
    """Kills: a connection made anew for each request, whose handshake costs more than the payload; patience that is
    shorter than a handshake over a slow link."""
    exchange, network, clients = place
    link = network.link(bits_per_s=64_000, delay_s=0.02, jitter_s=0.01)
    clients.start("anna", link)
    assert exchange.wait_for(1, PATIENCE_S) == ["anna"]
    for number in (1, 2, 3):
        assert list(exchange.exchange(asked(number, "anna"), PATIENCE_S)) == [answer("anna", number)]
    assert link.connections == 1
    assert link.up_bytes + link.down_bytes > 3 * 8000
    assert clients.calls == [("anna", 1), ("anna", 2), ("anna", 3)]


def test_a_network_that_cuts_a_third_of_all_requests_and_answers_loses_none(place):
    """Kills: an answer lost with its connection; work done twice for a request that was delivered twice; a client that
    gives up."""
    exchange, network, clients = place
    link = network.link(seed=1, cut_frac=0.3)
    clients.start("anna", link)
    assert exchange.wait_for(1, PATIENCE_S) == ["anna"]
    for number in range(1, 9):
        assert list(exchange.exchange(asked(number, "anna"), PATIENCE_S)) == [answer("anna", number)]
    assert link.connections > 1
    assert clients.calls == [("anna", number) for number in range(1, 9)]


def test_a_link_that_stalls_costs_its_client_the_round_and_nobody_else(place):
    """Kills: a round that waits for a peer that is gone without a word; a client that never comes back."""
    exchange, network, clients = place
    link = network.link()
    clients.start("anna", link)
    clients.start("bert", network.link())
    assert exchange.wait_for(2, PATIENCE_S) == NAMES
    link.stall()
    assert list(exchange.exchange(asked(1, *NAMES), 3.0)) == [answer("bert", 1)]
    link.cut()  # as when a router forgets a connection
    link.flow()
    assert sorted(exchange.exchange(asked(2, *NAMES), PATIENCE_S)) == [answer("anna", 2), answer("bert", 2)]


def test_a_request_that_is_kept_is_answered_in_a_later_exchange(place):
    """Kills: a late answer refused at the door although it was waited for; one that came while nobody listened; a round
    held up by the answer to an earlier one; a request given up that is answered nevertheless."""
    exchange, network, clients = place
    release = threading.Event()
    clients.start("anna", network.link(), lambda request: release.wait(PATIENCE_S))
    clients.start("bert", network.link())
    assert exchange.wait_for(2, PATIENCE_S) == NAMES
    for number in (1, 2):
        names = NAMES if number == 1 else ["bert"]
        replies = exchange.exchange(asked(number, *names), PATIENCE_S, keep=True)
        assert next(replies) == answer("bert", number)
        replies.close()
        assert exchange.kept() == {"anna"}
    release.set()
    assert list(exchange.exchange({}, PATIENCE_S, keep=True)) == [answer("anna", 1)]
    assert exchange.kept() == set()
    release.clear()
    replies = exchange.exchange(asked(3, *NAMES), PATIENCE_S, keep=True)
    assert next(replies) == answer("bert", 3)
    replies.close()
    exchange.give_up(["anna"])
    release.set()
    assert list(exchange.exchange(asked(4, "anna"), PATIENCE_S, keep=True)) == [answer("anna", 4)]
    assert exchange._link.grid.state.num_message_ins() == 0


@pytest.mark.parametrize("minutes", [-10, 10])
def test_a_clock_ten_minutes_off_is_one_line_that_says_so(place, monkeypatch, minutes):
    """Kills: a client refused for its key when its clock is to blame; one that tries for ever."""
    import flwr.supernode.node_auth_http_interceptor as interceptor

    real, off = interceptor.now, datetime.timedelta(minutes=minutes)
    monkeypatch.setattr(interceptor, "now", lambda: real() + off)
    exchange, _, clients = place
    join = read_join_file(clients._keys.join_path("anna"))
    with pytest.raises(FederationError, match="Check that the clocks of both machines agree within 5 minutes") as told:
        serve(join, lambda request: Reply(), 5.0)
    assert "\n" not in str(told.value)
    assert exchange.roster() == []
