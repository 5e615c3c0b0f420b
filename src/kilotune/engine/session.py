"""Session: a composed plan becomes a run folder — base, rows, clients and evaluation put together.

`federate` (all clients on this machine), `serve` and `join` (deployed) and `tune` (alone) differ only in who answers
the requests; rounds, ledger, evaluation and outputs are the same code.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kilotune.core.errors import DataError, RecipeError
from kilotune.core.noise import NOISE_SPEC
from kilotune.core.rng import stream
from kilotune.engine import seedfile
from kilotune.engine.compose import Plan, build
from kilotune.engine.data import Row, data_digest, load_rows, partition, partition_counts
from kilotune.engine.evaluation import EvaluationReport, evaluate
from kilotune.engine.export import export_peft
from kilotune.engine.federation import Federation
from kilotune.engine.flower.local import LocalExchange
from kilotune.engine.ledger import Header, Ledger
from kilotune.engine.models import Base, load_base
from kilotune.engine.replica import Replica
from kilotune.engine.runfolder import RunFolder
from kilotune.engine.tokenize import Example, encode, stop_ids
from kilotune.engine.tune import Trainer
from kilotune.engine.worker import Worker, peak_rss

ALONE = "local"
Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Rows:
    """A data source split for one run: training rows by client, and evaluation rows."""

    clients: dict[str, list[Row]]
    held_out: list[Row]
    counts: dict[str, dict[str, Any]]  # per client: rows, and labels where the partition goes by a label
    digest: str  # of all rows before any was left out


def split_rows(plan: Plan, alone: bool) -> Rows:
    """Load, honour `split`, partition. Raises DataError when nothing is left to train or evaluate on."""
    section = plan.recipe.data
    rows = load_rows(section.path)
    train = [row for row in rows if row.split == "train"]
    held_out = [row for row in rows if row.split != "train"]
    if section.eval_path is not None:
        held_out = load_rows(section.eval_path)
        held_out = [row for row in held_out if row.split != "train"] or held_out
    if section.only is not None:
        train = [row for row in train if row.client == section.only]
    if not train:
        whose = f" of client {section.only!r}" if section.only is not None else ""
        raise DataError(
            f"{section.path}: got {len(rows)} rows, but no training row{whose}. Check `split` and `client`."
        )
    shares = {ALONE: list(range(len(train)))} if alone else partition(train, plan.partition, plan.recipe.seed)
    clients = {name: [train[i] for i in indices[: section.limit]] for name, indices in shares.items()}
    fields = plan.partition.fields if plan.partition is not None else ()
    label = next((field for field in fields if field != "client"), None)
    held_out = spread(held_out, plan.recipe.evaluation.limit, plan.recipe.seed)
    return Rows(clients, held_out, partition_counts(train, shares, label), data_digest(rows))


def spread(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    """At most `limit` rows, taken in turn from every client's, each client's in a fixed random order."""
    if limit is None or len(rows) <= limit:
        return rows
    by_client: dict[str, list[Row]] = {}
    for row in rows:
        by_client.setdefault(row.client or "", []).append(row)
    queues = []
    for name in sorted(by_client):
        order = stream(seed, "held-out", name).permutation(len(by_client[name]))
        queues.append([by_client[name][i] for i in order])
    chosen: list[Row] = []
    depth = 0
    while len(chosen) < limit:
        chosen += [queue[depth] for queue in queues if depth < len(queue)][: limit - len(chosen)]
        depth += 1
    return chosen


def open_base(plan: Plan, emit: Emit) -> Base:
    """The recipe's base model, writable."""
    torch.set_num_threads(plan.recipe.threads or torch.get_num_threads())
    emit({"event": "status", "text": f"loading base {plan.recipe.base}"})
    return load_base(plan.recipe.base, writable=True)


def encode_rows(plan: Plan, base: Base, rows: list[Row], who: str, emit: Emit) -> list[Example]:
    """Examples; what had to be cut is reported."""
    if not rows:
        return []
    examples, report = encode(rows, base.tokenizer, plan.recipe.data)
    if report.num_truncated:
        emit({"event": "truncated", "who": who, "rows": report.num_rows, "cut": report.num_truncated})
    return examples


def evaluator(plan: Plan, emit: Emit) -> Callable[[Replica, list[Example]], EvaluationReport]:
    """Measures a replica on examples as the recipe says."""
    settings = plan.recipe.evaluation

    def progress(done: int, total: int) -> None:
        emit({"event": "progress", "what": "evaluating", "done": done, "total": total})

    def measure(replica: Replica, examples: list[Example]) -> EvaluationReport:
        return evaluate(
            replica.model,
            replica.base.tokenizer,
            examples,
            max_new_tokens=settings.max_new_tokens if settings.generate else 0,
            stop_ids=stop_ids(replica.base.tokenizer, plan.recipe.data),
            progress=progress,
        )

    return measure


def header(plan: Plan, base: Base) -> Header:
    return Header(base.name, base.digest, plan.id, NOISE_SPEC, plan.resolved())


def federate(plan: Plan, output: Path, emit: Emit, steps: int | None = None) -> dict[str, Any]:
    """All clients on this machine, over one resident base; returns the summary.

    `steps` is given by `tune`: a recipe over a basis is tuned as a federation of one.
    """
    started = time.monotonic()
    run = RunFolder(output)
    with run.locked():
        emit = recording(run, emit)
        rows = split_rows(plan, alone=steps is not None)
        base = open_base(plan, emit)
        ledger = Ledger.open(output, header(plan, base))
        run.write_recipe(plan)
        replica = Replica(base, plan)
        measure = evaluator(plan, emit)
        held_out = encode_rows(plan, base, rows.held_out, "evaluation", emit)
        workers = {
            name: Worker(
                name,
                replica,
                ledger.header.hash,
                encode_rows(plan, base, members, name, emit),
                [],
                measure,
                output / "clients" / name,
                keeps_rounds=False,
                progress=_local_progress(emit, name),
            )
            for name, members in rows.clients.items()
        }
        labels = {name: count["labels"] for name, count in rows.counts.items() if "labels" in count}
        sizes = {name: len(worker.train) for name, worker in workers.items()}
        emit({"event": "clients", "rows": sizes, "data_digest": rows.digest} | ({"labels": labels} if labels else {}))
        exchange = LocalExchange({name: worker.handle for name, worker in workers.items()})
        federation = Federation(plan, replica, ledger, exchange, output, emit, lambda r: measure(r, held_out))
        reports = federation.run()
        extra = {"command": "tune", "steps": steps} if steps is not None else None
        return finish(run, plan, federation, reports, len(workers), time.monotonic() - started, extra)


def _local_progress(emit: Emit, client: str) -> Callable[[str], None]:
    return lambda line: emit({"event": "progress", "what": f"{client}: {line}"})


def recording(run: RunFolder, emit: Emit) -> Emit:
    """Events worth keeping go to metrics.jsonl; all go to the display."""

    def both(event: dict[str, Any]) -> None:
        if event["event"] not in ("progress", "status"):
            run.record(event)
        emit(event)

    return both


def finish(
    run: RunFolder,
    plan: Plan,
    federation: Federation,
    reports: dict[str, EvaluationReport],
    num_clients: int,
    seconds: float,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Outputs of a federation: seed file or adapter, summary, report."""
    tally, ledger = federation.tally, federation.ledger
    outputs = write_outputs(run, plan, federation.replica, ledger)
    rounds_done = max(1, tally.client_rounds)
    summary = {
        "command": "federate",
        "rounds": len(ledger),
        "clients": num_clients,
        "ledger_head": ledger.head,
        **common_facts(run, plan, federation.replica, reports, seconds),
        "payload_up_bytes_per_client_round": round(tally.up_bytes / rounds_done, 1),
        "payload_down_bytes_per_client_round": round(tally.down_bytes / rounds_done, 1),
        "peak_rss_bytes": max(peak_rss(), tally.peak_rss_bytes),
        "client_digests": {c: d for c, d in tally.client_digests.items() if d != "shared"},
        "outputs": outputs,
        **(extra or {}),
    }
    close(run, summary)
    return summary


def common_facts(
    run: RunFolder, plan: Plan, replica: Replica, reports: dict[str, EvaluationReport], seconds: float
) -> dict[str, Any]:
    """What every summary says, of a federation or of one machine."""
    after = reports["after"]
    before = reports["before"].overall.to_json() if "before" in reports else first_evaluation(run)
    return {
        "digest": replica.digest(),
        "recipe_id": plan.id,
        "base": replica.base.name,
        "base_digest": replica.base.digest,
        "seconds": round(seconds, 2),
        "eval": {"before": before, "after": after.overall.to_json()},
        "eval_clients": {"after": after.clients_to_json()},
    }


def close(run: RunFolder, summary: dict[str, Any]) -> None:
    """Write the summary and the report."""
    from kilotune.engine.report import write_report

    run.record({"event": "end", "digest": summary["digest"]})
    run.write_summary(summary)
    write_report(run)


def first_evaluation(run: RunFolder) -> dict[str, Any] | None:
    """The evaluation before training of a run that was interrupted and resumed."""
    for event in run.events():
        if event["event"] == "evaluation" and event.get("round", event.get("step")) == 0:
            overall: dict[str, Any] = event["overall"]
            return overall
    return None


def write_outputs(run: RunFolder, plan: Plan, replica: Replica, ledger: Ledger | None) -> dict[str, Any]:
    """The fine-tune itself: a seed file for a basis, a PEFT folder for an adapter."""
    outputs: dict[str, Any] = {}
    if ledger is not None and plan.basis is not None:
        outputs["seed_file"] = "final.seed"
        outputs["seed_file_bytes"] = seedfile.write(ledger, run.path / "final.seed")
    if plan.parametrization.method_name() == "peft":
        export_peft(replica.model, replica.base, run.path / "adapter")
        outputs["adapter"] = "adapter"
    return outputs


def tune(plan: Plan, output: Path, emit: Emit) -> dict[str, Any]:
    """One machine alone; returns the summary."""
    if plan.parametrization.uses_basis:
        return federate(as_federation(plan), output, emit, plan.recipe.steps)
    started = time.monotonic()
    run = RunFolder(output)
    with run.locked():
        emit = recording(run, emit)
        rows = split_rows(plan, alone=True)
        base = open_base(plan, emit)
        run.write_recipe(plan)
        replica = Replica(base, plan)
        measure = evaluator(plan, emit)
        train = encode_rows(plan, base, rows.clients[ALONE], "training", emit)
        held_out = encode_rows(plan, base, rows.held_out, "evaluation", emit)
        trainer = Trainer(plan, replica, train, lambda r: measure(r, held_out), output, emit)
        reports = trainer.run()
        summary = {
            "command": "tune",
            "steps": trainer.step,
            "rounds": 0,
            "clients": 1,
            **common_facts(run, plan, replica, reports, time.monotonic() - started),
            "peak_rss_bytes": peak_rss(),
            "outputs": write_outputs(run, plan, replica, None),
        }
        close(run, summary)
        return summary


def as_federation(plan: Plan) -> Plan:
    """A local recipe over a basis as a federation of one: every `local_steps` steps are a round of its ledger."""
    recipe = plan.recipe
    steps = recipe.steps or 0
    if steps % recipe.local_steps:
        raise RecipeError(
            f"steps: got {steps}, expected a multiple of local_steps ({recipe.local_steps}), "
            "the steps after which the change is committed."
        )
    content = plan.resolved()
    content |= {"steps": None, "rounds": steps // recipe.local_steps}
    every = recipe.evaluation.every
    content["evaluation"] = {**content["evaluation"], "every": -(-every // recipe.local_steps)}
    return build(content, "federate")
