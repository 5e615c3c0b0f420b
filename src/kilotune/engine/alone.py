"""Alone: one machine with its own rows. A recipe over a basis runs as a federation of one, one with `sharding` slice by
slice, any other as plain steps."""

import time
from pathlib import Path
from typing import Any

from kilotune.core.errors import RecipeError
from kilotune.engine.composing.compose import build
from kilotune.engine.composing.plan import Plan
from kilotune.engine.memory import peak_rss
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rows.shares import ALONE, split_rows
from kilotune.engine.runfolder import RunFolder
from kilotune.engine.session import (
    Emit,
    close,
    common_facts,
    encode_rows,
    evaluator,
    federate,
    open_base,
    recording,
    write_outputs,
)
from kilotune.engine.training.sharded import tune_sharded
from kilotune.engine.training.tune import Trainer


def tune(plan: Plan, output: Path, emit: Emit) -> dict[str, Any]:
    """One machine alone; returns the summary."""
    if plan.recipe.sharding.slices:
        return tune_sharded(plan, output, emit)
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
            "outputs": write_outputs(run, plan, replica, None),
            "peak_rss_bytes": peak_rss(),
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
