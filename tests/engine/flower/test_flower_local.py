"""The in-process exchange: order, errors."""

import pytest
from flwr.serverapp import Grid

from kilotune.engine.flower.local import LocalExchange, LocalGrid
from kilotune.engine.flower.messages import Reply, Request


def test_clients_are_called_one_after_another_in_order_of_name():
    """Kills: dict order, threads, calling all before the first reply is yielded."""
    calls = []

    def handler(name):
        def handle(request):
            calls.append(name)
            return Reply({"name": name, "round": request.body["round"]}, request.payloads)

        return handle

    exchange = LocalExchange({name: handler(name) for name in ("c", "a", "b")})
    assert exchange.roster() == ["a", "b", "c"]
    replies = exchange.exchange({n: Request("train", {"round": 4}, (n.encode(),)) for n in ("c", "b", "a")})
    assert next(replies) == ("a", Reply({"name": "a", "round": 4}, (b"a",)))
    assert calls == ["a"]
    assert [name for name, _ in replies] == ["b", "c"]
    assert exchange.traffic() is None


def test_errors_of_one_client_leave_the_others_alone_and_bugs_end_the_run():
    """Kills: one bad client ending the round; a bug of ours that passes for a lost client."""

    def fails(request):
        return Reply(error="row 7 is empty")

    def broken(request):
        raise ValueError("a bug")

    exchange = LocalExchange({"bad": fails, "good": lambda request: Reply({"ok": True})})
    replies = dict(exchange.exchange({"bad": Request("train"), "good": Request("train")}))
    assert replies["bad"].error == "row 7 is empty"
    assert replies["good"] == Reply({"ok": True})
    with pytest.raises(ValueError, match="a bug"):
        list(LocalExchange({"x": broken}).exchange({"x": Request("train")}))


def test_a_slow_client_is_no_reason_to_leave_the_others_out():
    """Kills: a simulated run that depends on the speed of the machine."""
    exchange = LocalExchange(dict.fromkeys("abc", lambda request: Reply()))
    assert [name for name, _ in exchange.exchange(dict.fromkeys("abc", Request("train")), 0.0)] == ["a", "b", "c"]


def test_a_handler_cannot_change_the_request_of_another():
    """Kills: one mutable record shared by all clients, as Flower's strategies do."""

    def spoil(request):
        request.body["round"] = 99
        return Reply(dict(request.body))

    request = Request("train", {"round": 1})
    replies = dict(
        LocalExchange({"a": spoil, "b": lambda r: Reply(dict(r.body))}).exchange({"a": request, "b": request})
    )
    assert replies["b"].body == {"round": 1}
    assert request.body == {"round": 1}


def test_the_local_grid_is_a_flower_grid():
    """Kills: a Grid that Flower would refuse to instantiate after a change of its abstract members."""
    assert isinstance(LocalGrid({}), Grid)
