"""CO2: rounds whose result is foreseen last as long as their steps or as their way, whichever is longer."""

from dataclasses import replace
from itertools import pairwise

import pytest

from engine.test_ahead import Client, lead
from federating import plan, quiet, write_rows
from kilotune.core.registry import find
from kilotune.engine.flower.local import LocalExchange
from kilotune.engine.rounds.ahead import foreseen
from kilotune.engine.session import federate

NAMES, ROUNDS, STEPS = ("ada", "bob"), 4, 3
EXACT = ("uplink={name: dense, dtype: fp32}", "downlink={name: dense, dtype: fp32}")  # of which every bit tells
SETTINGS = (*EXACT, f"rounds={ROUNDS}", f"local_steps={STEPS}", "batch_size=2", "evaluation.every=0")
SETTINGS += ("lr_schedule=wsd", "warmup_frac=0.1", "clients=[{share: 0.6, batch_size: 3}]")
ADAPTER = ("parametrization.config={r: 2, target_modules: [q_proj]}",)
ALL = ("parametrization={name: full}", "optimizer.lr=1e-4")
PULLED = (*ADAPTER, "optimizer={name: proximal, lr: 1e-3}")  # towards where the round begins
WAITING = ("server_optimizer.late=false",)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("foreseen") / "rows.jsonl", 4, NAMES)


class Timed(LocalExchange):
    """Clients that take a tick for a step, and links that take so many ticks each way. Nothing else takes time."""

    def __init__(self, clients: dict[str, Client], way: int) -> None:
        self._clients, self._way = clients, way
        self._sent, self._now, self._ends = 0, 0, {}
        self._free = dict.fromkeys(clients, 0)  # since when it has nothing more to answer
        super().__init__({name: self._handler(name) for name in clients})

    def _handler(self, name):
        def handle(request):
            client = self._clients[name]
            if request.kind != "train":
                client.ahead(most=1)  # begins before the result is heard, and goes on after it
                return client.worker.handle(request)
            arrives, free = self._sent + self._way, self._free[name]
            ready = max(arrives, free + self._steps(client, lambda: client.ahead(most=arrives - free)))
            replies = []
            self._free[name] = ready + self._steps(client, lambda: replies.append(client.worker.handle(request)))
            self._now = self._ends[request.body["round"]] = max(self._now, self._free[name] + self._way)
            return replies[0]

        return handle

    def _steps(self, client, work) -> int:
        before = len(client.steps)
        work()
        return len(client.steps) - before

    def exchange(self, requests, deadline_s=None, keep=False):
        self._sent = self._now
        yield from super().exchange(requests, deadline_s, keep)

    @property
    def lengths(self) -> list[int]:
        """Ticks of every round but the first, ahead of which nobody can have worked."""
        return [after - before for before, after in pairwise(self._ends.values())]


def timed(recipe, base, folder, way):
    """The ledger's head, the rounds' lengths, and what steps were taken."""
    clients = {name: Client(name, recipe, base, folder) for name in NAMES}
    exchange = Timed(clients, way)
    ledger = lead(recipe, base, folder / "server", exchange)
    return ledger.head, exchange.lengths, {name: [step[:2] for step in c.steps] for name, c in clients.items()}


EACH_ONCE = {name: [(n, s) for n in range(1, ROUNDS + 1) for s in range(1, STEPS + 1)] for name in NAMES}


@pytest.mark.parametrize("way", [0, 1, 2])
def test_a_round_takes_the_longer_of_its_steps_and_its_way_not_their_sum(rows, base, tmp_path, way):
    """Kills: a client that waits for the result of a round before it begins the next; steps taken twice, or thrown
    away when the request comes before their end."""
    overlapping, waiting = (plan(base, rows, "co2", *SETTINGS, *ADAPTER, *more) for more in ((), WAITING))
    _, lengths, steps = timed(overlapping, base, tmp_path / "overlapping", way)
    assert (lengths, steps) == ([max(STEPS, 2 * way)] * (ROUNDS - 1), EACH_ONCE)
    _, lengths, steps = timed(waiting, base, tmp_path / "waiting", way)
    assert (lengths, steps) == ([STEPS + 2 * way] * (ROUNDS - 1), EACH_ONCE)


MEASURED = (*ADAPTER, "evaluation.every=1")  # clients hear a round's result before they are asked for the next


@pytest.mark.parametrize(
    "settings", [ADAPTER, ALL, PULLED, MEASURED], ids=["adapter", "all weights", "proximal", "measured"]
)
def test_no_bit_depends_on_how_far_a_client_is_ahead(rows, base, tmp_path, settings):
    """Kills: a start that is foreseen with the mean before, or with another rounding; a pull towards the start before;
    a step that is foreseen once more when it has been heard; moments or weights that are lost between two requests; a
    deployed client that is not a simulated one."""
    recipe = plan(base, rows, "co2", *SETTINGS, *settings)
    heads = {timed(recipe, base, tmp_path / str(way), way)[0] for way in (0, 1, 5)}
    assert heads == {federate(recipe, tmp_path / "simulated", quiet)["ledger_head"]}


def test_nobody_works_ahead_where_the_next_round_may_begin_elsewhere(rows, base):
    """Kills: steps from a start that is not the next round's, which would be sent as if they were."""
    recipe = plan(base, rows, "co2", *SETTINGS, *ADAPTER)
    asked = {"round": 1, "progress": 0.0, "group": -1}
    assert foreseen(recipe, asked) is not None
    assert foreseen(recipe, {**asked, "round": ROUNDS, "progress": 0.75}) is None
    assert foreseen(plan(base, rows, "co2", *SETTINGS, *PULLED), asked) is not None
    private = find("privacy", "central")
    assert foreseen(replace(recipe, privacy=private(**private.example)), asked) is None
    for more in (WAITING, ("parametrization=subspace", "basis={name: tiled, refresh: run}", "uplink=coefficients")):
        assert foreseen(plan(base, rows, "co2", *SETTINGS, *more), asked) is None
