"""Federations with liars: simulated clients, some of whose replies are altered on the way out."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from federating import quiet
from kilotune.core.types import SeedUpdate, TensorUpdate, Update
from kilotune.engine.flower.local import LocalExchange
from kilotune.engine.flower.messages import Reply, Request
from kilotune.engine.rounds.federation import Federation
from kilotune.engine.rounds.ledger import Ledger
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.session import encode_rows, evaluator, header, open_base, split_rows
from kilotune.engine.simulation import PackedRows, Simulation

Lie = Callable[[Replica, Request, Reply], Reply]


class Watched(LocalExchange):
    """Remembers who was asked to train, as (round, client)."""

    def __init__(self, handlers):
        super().__init__(handlers)
        self.asked: list[tuple[int, str]] = []

    def exchange(self, requests, deadline_s=None):
        self.asked += [(r.body["round"], c) for c, r in requests.items() if r.kind == "train"]
        yield from super().exchange(requests, deadline_s)


def prepared(plan, folder: Path, lies: dict[str, Lie] | None = None, emit=quiet, rows: bool = True) -> Federation:
    """A federation of the plan's own clients; `lies` alter the answers of those they name. `rows`: the server's."""
    base = open_base(plan, quiet)
    ledger = Ledger.open(folder, header(plan, base))
    replica, measure, shares = Replica(base, plan), evaluator(plan, quiet), split_rows(plan, alone=False)
    held_out = encode_rows(plan, base, shares.held_out, "", quiet)
    simulation = Simulation(
        replica,
        ledger,
        PackedRows(shares.clients),
        lambda members, client: encode_rows(plan, base, members, client, quiet),
        measure,
        folder,
        emit,
    )
    handlers = simulation.handlers()
    for client, lie in (lies or {}).items():
        handlers[client] = partial(_lying, handlers[client], lie, replica)
    evaluate = (lambda r: measure(r, held_out)) if rows else None
    return Federation(plan, replica, ledger, Watched(handlers), folder, emit, evaluate, shared=rows)


def _lying(handler, lie: Lie, replica: Replica, request: Request) -> Reply:
    reply = handler(request)
    return lie(replica, request, reply) if request.kind == "train" and reply.error is None else reply


def changed(change: Callable[[Update], Update]) -> Lie:
    """A lie about the update: decoded, changed, encoded again as the recipe does."""

    def lie(replica: Replica, request: Request, reply: Reply) -> Reply:
        codec, context = replica.plan.uplink, replica.context(int(request.body["round"]))
        return replace(reply, payloads=(codec.encode(change(codec.decode(reply.payloads[0], context)), context, {}),))

    return lie


def times(factor: float) -> Lie:
    """The honest update, scaled."""

    def change(update: Update) -> Update:
        if isinstance(update, SeedUpdate):
            return SeedUpdate(update.indices, (update.coefs * np.float32(factor)).astype(np.float32), update.groups)
        return TensorUpdate({name: tensor * factor for name, tensor in update.tensors.items()})

    return changed(change)


def claiming(**facts) -> Lie:
    """The honest update beside other facts."""
    return lambda replica, request, reply: replace(reply, body={**reply.body, **facts})
