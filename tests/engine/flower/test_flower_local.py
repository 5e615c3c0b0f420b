"""The in-process exchange: order, errors, deadline."""

import pytest
from flwr.serverapp import Grid

from kilotune.engine.flower import local
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


def test_a_handler_that_raises_becomes_an_error_reply_and_the_others_go_on():
    """Kills: one bad client ending the round."""

    def fails(request):
        raise ValueError("row 7 is empty")

    def silent(request):
        raise KeyboardInterrupt

    exchange = LocalExchange({"bad": fails, "good": lambda request: Reply({"ok": True})})
    replies = dict(exchange.exchange({"bad": Request("train"), "good": Request("train")}))
    assert replies["bad"].error == "ValueError: row 7 is empty"
    assert replies["good"] == Reply({"ok": True})
    with pytest.raises(KeyboardInterrupt):  # Ctrl-C is not a client's error
        list(LocalExchange({"x": silent}).exchange({"x": Request("train")}))


def test_after_the_deadline_no_further_client_is_asked(monkeypatch):
    """Kills: ignoring deadline_s."""
    clock = [0.0]
    monkeypatch.setattr(local.time, "monotonic", lambda: clock[0])

    def slow(request):
        clock[0] += 6.0
        return Reply()

    exchange = LocalExchange(dict.fromkeys("abc", slow))
    assert [name for name, _ in exchange.exchange(dict.fromkeys("abc", Request("train")), 10.0)] == ["a", "b"]


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
