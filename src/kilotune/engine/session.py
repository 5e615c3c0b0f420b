"""Session: a composed plan becomes a run folder — base, rows, clients and evaluation put together.

`federate` (all clients on this machine), `serve` and `join` (deployed.py) and `tune` (alone.py) differ only in who
answers the requests; rounds, ledger, evaluation and outputs are the same code.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kilotune.core.noise import NOISE_SPEC
from kilotune.engine.afterwards import seedfile
from kilotune.engine.composing.plan import Plan
from kilotune.engine.flower.local import LocalExchange
from kilotune.engine.memory import peak_rss
from kilotune.engine.model.base import Base, load_base
from kilotune.engine.model.evaluation import EvaluationReport, evaluate
from kilotune.engine.model.export import export_peft
from kilotune.engine.partial.alignment import load_aligned
from kilotune.engine.partial.emulator import unread
from kilotune.engine.rounds.federation import Federation
from kilotune.engine.rounds.ledger import Header, Ledger
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rows.data import Row, load_rows
from kilotune.engine.rows.shares import Rows, split_rows
from kilotune.engine.rows.tokenize import Example, encode, stop_ids
from kilotune.engine.runfolder import RunFolder
from kilotune.engine.simulation import PackedRows, Simulation

Emit = Callable[[dict[str, Any]], None]


def open_base(plan: Plan, emit: Emit, whole: bool = True) -> Base:
    """The recipe's base model to train: mapped from its file where no weight of it is ever written. `whole` False:
    for who never uses more of it than the emulator keeps."""
    torch.set_num_threads(plan.recipe.threads or torch.get_num_threads())
    emit({"event": "status", "text": f"loading base {plan.recipe.base}"})
    spared = None if whole else partial(unread, plan, plan.recipe.base)
    return load_base(plan.recipe.base, writable=plan.parametrization.writes_base, unread=spared)


def encode_rows(plan: Plan, base: Base, rows: list[Row], who: str, emit: Emit) -> list[Example]:
    """Examples; what had to be cut is reported."""
    if not rows:
        return []
    examples, report = encode(rows, base.tokenizer, plan.recipe.data)
    if report.num_truncated:
        emit({"event": "truncated", "who": who, "rows": report.num_rows, "cut": report.num_truncated})
    return examples


def evaluator(plan: Plan, emit: Emit) -> Callable[[Replica, list[Example]], EvaluationReport]:
    """Measures a replica on examples as the recipe says; one with an emulator in both forms, where it holds both."""
    settings = plan.recipe.evaluation

    def progress(done: int, total: int) -> None:
        emit({"event": "progress", "what": "evaluating", "done": done, "total": total})

    def once(replica: Replica, examples: list[Example]) -> EvaluationReport:
        return evaluate(
            replica.model,
            replica.base.tokenizer,
            examples,
            max_new_tokens=settings.max_new_tokens if settings.generate else 0,
            stop_ids=stop_ids(replica.base.tokenizer, plan.recipe.data),
            progress=progress,
        )

    def measure(replica: Replica, examples: list[Example]) -> EvaluationReport:
        if replica.middle is None or not replica.middle.can_be_whole:
            return once(replica, examples)
        with replica.whole():
            report = once(replica, examples)
        return replace(report, emulator=once(replica, examples).overall)

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
        packed, rows_held_out, who = PackedRows(rows.clients), rows.held_out, _clients_event(rows)
        del rows  # before the model comes, so that it can have the space
        base = open_base(plan, emit)
        ledger = Ledger.open(output, header(plan, base))
        run.write_recipe(plan)
        replica = Replica(base, plan)
        measure = evaluator(plan, emit)
        held_out = encode_rows(plan, base, rows_held_out, "evaluation", emit)
        load_aligned(replica, output, lambda path: encode_rows(plan, base, load_rows(path), "alignment", emit), emit)
        encode_client = partial(_encode_client, plan, base, emit)
        simulation = Simulation(replica, ledger, packed, encode_client, measure, output, emit)
        emit(who)
        exchange = LocalExchange(simulation.handlers())
        federation = Federation(
            plan, replica, ledger, exchange, output, emit, lambda r: measure(r, held_out), shared=True
        )
        reports = federation.run()
        extra = {"command": "tune", "steps": steps} if steps is not None else None
        return finish(run, plan, federation, reports, len(packed.counts), time.monotonic() - started, extra)


def _encode_client(plan: Plan, base: Base, emit: Emit, rows: list[Row], client: str) -> list[Example]:
    return encode_rows(plan, base, rows, client, emit)


def _clients_event(rows: Rows) -> dict[str, Any]:
    labels = {name: count["labels"] for name, count in rows.counts.items() if "labels" in count}
    sizes = {name: len(members) for name, members in rows.clients.items()}
    event = {"event": "clients", "rows": sizes, "data_digest": rows.digest}
    return event | ({"labels": labels} if labels else {})


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
        **federation.privacy.summary(),
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
        **_emulator_facts(run, replica, reports),
    }


def _emulator_facts(run: RunFolder, replica: Replica, reports: dict[str, EvaluationReport]) -> dict[str, Any]:
    """What clients held, and how it fares beside the full model, whose figures are `eval`."""
    if replica.middle is None:
        return {}
    figures = {when: report.emulator.to_json() for when, report in reports.items() if report.emulator is not None}
    return {
        "emulator": asdict(replica.middle.layout) | {"held": replica.middle.layout.held},
        "eval_emulator": {"before": first_evaluation(run, "emulator"), **figures},
    }


def close(run: RunFolder, summary: dict[str, Any]) -> None:
    """Write the summary and the report."""
    from kilotune.engine.reporting.report import write_report

    run.record({"event": "end", "digest": summary["digest"]})
    run.write_summary(summary)
    write_report(run)


def first_evaluation(run: RunFolder, of: str = "overall") -> dict[str, Any] | None:
    """The evaluation before training of a run that was interrupted and resumed."""
    for event in run.events():
        if event["event"] == "evaluation" and event.get("round", event.get("step")) == 0:
            figures: dict[str, Any] | None = event.get(of)
            return figures
    return None


def write_outputs(run: RunFolder, plan: Plan, replica: Replica, ledger: Ledger | None) -> dict[str, Any]:
    """The fine-tune itself: a seed file for a basis, a PEFT folder for an adapter."""
    outputs: dict[str, Any] = {}
    if ledger is not None and plan.basis is not None:
        outputs["seed_file"] = "final.seed"
        outputs["seed_file_bytes"] = seedfile.write(ledger, run.path / "final.seed")
    if "adapter" in plan.parametrization.gives:
        with replica.whole():
            export_peft(replica.model, replica.base, run.path / "adapter")
        outputs["adapter"] = "adapter"
    return outputs
