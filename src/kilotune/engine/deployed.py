"""Deployed: the same rounds with clients in other processes and on other machines, over Flower with TLS."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kilotune.core.errors import DataError, FederationError
from kilotune.engine.afterwards.withdrawn import withdrawn
from kilotune.engine.composing.plan import Plan
from kilotune.engine.flower.client import serve as stay
from kilotune.engine.flower.keys import ENROLLED as MOST_CLIENTS
from kilotune.engine.flower.keys import load_server_keys, read_join_file
from kilotune.engine.flower.limits import limits_of
from kilotune.engine.flower.messages import Reply, Request
from kilotune.engine.flower.server import start_server
from kilotune.engine.interrupt import StoppedError, asked_to_stop
from kilotune.engine.memory import peak_rss
from kilotune.engine.model.base import Base
from kilotune.engine.model.evaluation import EvaluationReport
from kilotune.engine.partial.emulator import require_deployable
from kilotune.engine.partial.split import refuse_deployed
from kilotune.engine.rounds.ahead import Ahead
from kilotune.engine.rounds.federation import Federation
from kilotune.engine.rounds.identity import Heads, open_identity
from kilotune.engine.rounds.ledger import Ledger
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rounds.worker import Worker
from kilotune.engine.rows.data import load_rows
from kilotune.engine.rows.shares import load_held_out, spread
from kilotune.engine.runfolder import RunFolder
from kilotune.engine.session import Emit, encode_rows, evaluator, finish, header, open_base, recording

PATIENCE_S = 24 * 3600.0


def serve(plan: Plan, keys_folder: Path, output: Path, wait_for: int, emit: Emit) -> dict[str, Any]:
    """Lead a federation until its rounds are done; returns the summary. Quality is measured by the clients, or, where
    they hold an emulator only, on rows of the server."""
    started = time.monotonic()
    require_deployable(plan, server=True)
    refuse_deployed(plan)
    keys = load_server_keys(keys_folder)
    run = RunFolder(output)
    with run.locked():
        emit = recording(run, emit)
        exchange = start_server(
            keys, keys.host, keys.port, lambda text: emit({"event": "status", "text": text}), open_identity(output)
        )
        try:
            base = open_base(plan, emit)
            ledger = Ledger.open(output, header(plan, base))
            run.write_recipe(plan)
            replica = Replica(base, plan)
            exchange.limit(limits_of(plan, replica.shapes, len(keys.clients)))
            wanted = wait_for or len(keys.clients.keys() - withdrawn(output))
            emit({"event": "status", "text": f"listening on {exchange.address}, waiting for {wanted} clients"})
            present = exchange.wait_for(wanted, PATIENCE_S)
            if len(present) < wanted:
                raise FederationError(f"{len(present)} of {wanted} clients joined. Start the others and run again.")
            with asked_to_stop(emit) as stop:
                between, measure = stop.between_rounds(emit), _own_measure(plan, base, emit)
                federation = Federation(plan, replica, ledger, exchange, output, between, measure)
                reports = federation.run()
            _require_equal(federation)
            seconds = time.monotonic() - started
            return finish(run, plan, federation, reports, len(present), seconds, {"socket": _socket(federation)})
        finally:
            exchange.close()


def _own_measure(plan: Plan, base: Base, emit: Emit) -> Callable[[Replica], EvaluationReport] | None:
    """Measures on rows of the server, where it alone holds the full model."""
    section, path = plan.recipe.evaluation, plan.recipe.data.eval_path
    if not plan.recipe.emulator.active or path is None:
        return None
    rows = spread(load_held_out(path), section.limit, plan.recipe.seed)
    examples, measure = encode_rows(plan, base, rows, "evaluation", emit), evaluator(plan, emit)
    return lambda replica: measure(replica, examples)


def _require_equal(federation: Federation) -> None:
    """Every client that finished holds the weights this server holds."""
    ours = federation.replica.digest()
    other = {c: d for c, d in federation.tally.client_digests.items() if d != ours}
    if other:
        raise FederationError(
            f"clients {', '.join(sorted(other))} end with other weights than the server ({ours[:16]}). "
            "Their base or their kilotune differs; run `kilotune doctor` on both ends."
        )


def _socket(federation: Federation) -> dict[str, dict[str, int]]:
    """Bytes that crossed each client's socket, framing and TLS included, idle traffic apart."""
    return {client: asdict(traffic) for client, traffic in sorted((federation.exchange.traffic() or {}).items())}


def join(
    plan: Plan, join_path: Path, output: Path, wait_s: float, checkpoint: Path | None, emit: Emit
) -> dict[str, Any]:
    """Take part with this machine's rows until the server says finish; returns what this client holds then.

    `checkpoint` (kilotune replay --checkpoint) spares a newcomer the download of all rounds before it.
    """
    refuse_deployed(plan)
    require_deployable(plan, server=False)
    invitation = read_join_file(join_path)
    run = RunFolder(output)
    with run.locked():
        heads = Heads(invitation.federation, invitation.client, invitation.server_key, output)
        emit = recording(run, emit)
        rows, only = load_rows(plan.recipe.data.path), plan.recipe.data.only
        rows = [row for row in rows if only is None or row.client == only]
        if not any(row.split == "train" for row in rows):
            whose = f" with client = {only!r}" if only else ""
            raise DataError(f"{plan.recipe.data.path}: no training rows{whose}. Check `split` and `client`.")
        held_out = spread([r for r in rows if r.split != "train"], plan.recipe.evaluation.limit, plan.recipe.seed)
        base = open_base(plan, emit, whole=False)
        replica = Replica(base, plan, whole=False)
        train = [row for row in rows if row.split == "train"][: plan.recipe.data.limit]
        worker = Worker(
            invitation.client,
            replica,
            header(plan, base).hash,
            encode_rows(plan, base, train, "training", emit),
            encode_rows(plan, base, held_out, "evaluation", emit),
            evaluator(plan, emit),
            output,
            keeps_rounds=True,
            progress=lambda line: emit({"event": "progress", "what": line}),
            checkpoint=checkpoint,
            link=lambda number, head, part: heads.follow(number, head, plan.root(number), part),
            reopen=lambda: Replica(open_base(plan, emit, whole=False), plan, whole=False),
        )
        limits = limits_of(plan, replica.shapes, MOST_CLIENTS)
        emit({"event": "status", "text": f"client {invitation.client}: {len(train)} rows, joining {invitation.server}"})
        ahead, last = Ahead(worker.handle, worker.ahead), ""

        def say(text: str) -> None:
            emit({"event": "status", "text": text})

        def handle(request: Request) -> Reply:
            nonlocal last
            last = request.kind
            return ahead.handle(request)

        with asked_to_stop(emit) as stop:
            try:
                stay(invitation, handle, wait_s, say, stop.asked, heads, limits)
            finally:
                ahead.pause()
        if stop.requested and last != "finish":
            raise StoppedError(f"left after round {worker.round}, as asked. Run it again to go on.", stop.number)
        return {
            "client": invitation.client,
            "rounds": worker.round,
            "digest": worker.replica.digest(),
            "ledger_head": worker.head,
            "peak_rss_bytes": peak_rss(),
        }
