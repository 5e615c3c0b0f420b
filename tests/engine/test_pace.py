"""Pace: who is told to be slow, and who is not."""

from dataclasses import replace
from functools import partial

import pytest

from federating import CLIENTS, independent, plan, quiet
from kilotune.core.errors import IncompatibleError
from kilotune.engine.flower.local import LocalExchange
from kilotune.engine.flower.messages import Reply, Request
from kilotune.engine.model.base import load_base
from kilotune.engine.rounds.federation import Federation
from kilotune.engine.rounds.ledger import Ledger
from kilotune.engine.rounds.pace import Pace, Slow, lighter
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.session import header


def rounds(*seconds: dict[str, float], group: int = -1) -> list[list[Slow]]:
    pace, told = Pace(), []
    for times in seconds:
        for client, spent in times.items():
            pace.note(client, {"group": group}, spent)
        told.append(pace.slow())
    return told


def test_a_client_three_times_slower_is_told_at_the_second_time_and_again_at_the_fourth():
    """Kills: one slow round that is told; a client that is told in every round; counts that survive the telling."""
    slow, quick = {"ada": 1.0, "bob": 1.0, "cyd": 3.1}, {"ada": 1.0, "bob": 1.0, "cyd": 3.0}
    told = [[], [], [Slow("cyd", 3.1, 1.0)], [], [Slow("cyd", 3.1, 1.0)]]
    assert rounds(slow, quick, slow, slow, slow) == told


def test_clients_are_compared_with_their_own_class_and_two_are_no_class():
    """Kills: forward-only clients with twenty steps told slow beside those with two; a verdict between two clients."""
    pace = Pace()
    for _ in range(2):
        for client, group, spent in (("a", 0, 1.0), ("b", 0, 1.1), ("c", 0, 0.9), ("d", 1, 9.0), ("e", 1, 30.0)):
            pace.note(client, {"group": group}, spent)
        assert pace.slow() == []


def test_what_is_no_number_is_left_out():
    """Kills: a client's claim that ends the server's round."""
    pace = Pace()
    for client in "abc":
        pace.note(client, {"group": -1}, "fast")
    assert pace.slow() == []


def test_a_client_that_takes_twice_the_median_gets_half_the_steps_and_keeps_them():
    """Kills: steps that swing back because the shorter round looks fast; shares of a class of two; more than all."""
    pace, asked = Pace(adapts=True), {client: {"group": -1} for client in "abc"}
    speed = {"a": 1.0, "b": 1.0, "c": 2.0}
    for _ in range(3):
        for client in "abc":
            pace.note(client, asked[client], speed[client] * asked[client].get("share", 1.0))
        asked = {client: pace.asked(client, -1) for client in "abc"}
        assert [asked[client].get("share") for client in "abc"] == [1.0, 1.0, 0.5]
        assert pace.slow() == []
    assert Pace(adapts=False).asked("c", -1) == {"group": -1}
    assert pace.asked("new", -1) == {"group": -1}


def test_a_share_of_the_steps_is_never_none_and_only_where_the_recipe_says_so(base, data):
    """Kills: a client that trains nothing; a server that makes clients of another recipe train less."""
    adapting, fixed = (plan(base, data, "kilotune", "local_steps=5", *more) for more in (["adapt_steps=true"], []))
    steps = [lighter(adapting, share).recipe.local_steps for share in (1.0, 0.5, 0.01, 7.0, -1.0, None)]
    assert steps == [5, 2, 1, 5, 5, 5]
    assert lighter(fixed, 0.5) is fixed


def test_what_counts_on_equal_steps_is_refused(base, data):
    """Kills: controls of rounds of different lengths; an account of steps that were not taken."""
    with pytest.raises(IncompatibleError, match="adapt_steps: optimizer 'scaffold' counts on equal steps"):
        plan(base, data, "scaffold", "adapt_steps=true")


def test_a_slow_client_of_a_federation_sends_fewer_steps_and_ends_with_the_same_weights(base, data, tmp_path):
    """Kills: a share that is not sent, or not followed; a server that refuses what has fewer steps."""
    settings = ("rounds=3", "local_steps=4", "adapt_steps=true", "shared_directions=false")
    recipe = plan(base, data, "kilotune_zeroth", *settings)
    workers = {client: independent(client, recipe, base, tmp_path) for client in CLIENTS}
    sent = {client: [] for client in CLIENTS}

    def timed(client: str, request: Request) -> Reply:
        reply = workers[client].handle(request)
        if request.kind != "train":
            return reply
        pairs = recipe.uplink.decode(reply.payloads[0], workers[client].replica.context(request.body["round"]))
        sent[client].append(pairs.indices.size)
        return replace(reply, body={**reply.body, "seconds": pairs.indices.size * (2.0 if client == "cyd" else 1.0)})

    handlers = {client: partial(timed, client) for client in CLIENTS}
    loaded = load_base(str(base), writable=True)
    server, ledger = Replica(loaded, recipe), Ledger(header(recipe, loaded))
    Federation(recipe, server, ledger, LocalExchange(handlers), tmp_path / "server", quiet).run()
    assert sent == {"ada": [4, 4, 4], "bob": [4, 4, 4], "cyd": [4, 2, 2]}
    assert {worker.replica.digest() for worker in workers.values()} == {server.digest()}
