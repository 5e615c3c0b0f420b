"""Sharded tuning: LoRA trained slice by slice, so that rows can be forgotten exactly by deleting files.

A run folder holds `slices.json` (where each row is, by id) and `stages/SHARD/0-2-1.safetensors`: the layer group that
was trained last when shard SHARD had seen its slices 0, 2, 1. To forget a row is to delete every stage file whose name
holds its slice and to serve the longest order that is left, O(1) in the size of the model. What is served is one
adapter: the mean of the shards' weight changes, as factors laid side by side.
"""

import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from kilotune.core.errors import RunError
from kilotune.core.rng import derive, stream
from kilotune.engine.composing.compose import build
from kilotune.engine.composing.plan import Plan
from kilotune.engine.files import write_tensors
from kilotune.engine.memory import peak_rss
from kilotune.engine.model.compute import Compute
from kilotune.engine.model.evaluation import EvaluationReport
from kilotune.engine.model.tuned import plan_of
from kilotune.engine.reporting.report import write_report
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rows.batches import BatchSampler, micro_batches
from kilotune.engine.rows.data import Row, load_rows
from kilotune.engine.rows.shares import ALONE, split_rows
from kilotune.engine.rows.tokenize import Example
from kilotune.engine.runfolder import SUMMARY, RunFolder
from kilotune.engine.session import (
    Emit,
    close,
    common_facts,
    encode_rows,
    evaluator,
    open_base,
    recording,
    write_outputs,
)
from kilotune.engine.training.shards import (
    Order,
    layer_groups,
    place,
    row_id,
    seen_slices,
    stage_orders,
    surely_survives,
)
from kilotune.engine.training.stages import SLICES, Manifest, Stages, Tensors
from kilotune.engine.training.step import BatchObjective, Memory, rate, train_step
from kilotune.engine.training.tune import CHECKPOINT
from kilotune.parametrization._direct import DirectTrainable


class ShardedTrainer:
    """Trains the stages that are missing."""

    def __init__(
        self, plan: Plan, replica: Replica, stages: Stages, slices: dict[tuple[int, int], list[Example]], emit: Emit
    ) -> None:
        self._plan, self._replica, self._stages, self._slices, self._emit = plan, replica, stages, slices, emit
        self.start = {name: value.clone() for name, value in replica.trainable.wire.items()}
        self._groups = layer_groups(self.start, plan.recipe.sharding.slices)
        self._step = 0

    def run(self) -> None:
        """Every stage of every order that is not there."""
        for shard in self._stages.shards:
            for order in stage_orders(self._stages.orders):
                if not self._stages.holds(shard, order):
                    self.train(shard, order)

    def train(self, shard: int, order: Order) -> None:
        """The last stage of this beginning of an order, from the stages before it."""
        self._replica.trainable.restore({**self.start, **self._stages.tensors(shard, order[:-1])})
        rows = [example for piece in seen_slices(self._plan, order) for example in self._slices.get((shard, piece), [])]
        names = self._groups[len(order) - 1]
        wire = self._replica.trainable.wire
        if rows:
            self._steps(shard, order, rows, names)
        self._stages.write(shard, order, {name: wire[name] for name in names})

    def _steps(self, shard: int, order: Order, rows: list[Example], names: list[str]) -> None:
        recipe, model = self._plan.recipe, self._replica.model
        params = dict(model.named_parameters())
        group = DirectTrainable(model, {name: params[name] for name in sorted(names)})
        memory, steps = Memory.empty(), (recipe.steps or 0) // recipe.sharding.slices
        sampler = BatchSampler(len(rows), recipe.batch_size, derive(recipe.seed, "batches", "shard", shard, *order))
        for step in range(steps):
            started = time.monotonic()
            chosen = [rows[i] for i in sampler.indices(step)]
            batches = micro_batches(chosen, recipe, model, self._replica.base.tokenizer.pad_token_id)
            report = train_step(
                group,
                self._plan.estimator,
                self._plan.optimizer,
                BatchObjective(model, batches, Compute.of(recipe)),
                memory,
                rate(recipe.lr_schedule, recipe.warmup_frac, step / steps),
                stream(recipe.seed, "step", "shard", shard, *order, step),
            )
            if not math.isfinite(report.loss):
                raise RunError(f"shard {shard}, slices {order}: the loss is {report.loss}. Lower optimizer.lr.")
            self._step += 1
            tokens, seconds = sum(batch.num_labels for batch in batches), time.monotonic() - started
            self._emit({"event": "step", "step": self._step, "loss": report.loss, "tokens": tokens, "seconds": seconds})


def tune_sharded(plan: Plan, output: Path, emit: Emit) -> dict[str, Any]:
    """Train what is missing of a sharded run and serve the best of it; returns the summary."""
    started, run = time.monotonic(), RunFolder(output)
    with run.locked():
        emit = recording(run, emit)
        split = split_rows(plan, alone=True)
        base = open_base(plan, emit)
        manifest, rows = _settled(plan, base.digest, output, split.clients[ALONE])
        replica = Replica(base, plan)
        stages = Stages(output, plan, manifest)
        encoded = {at: encode_rows(plan, base, members, f"slice {at}", emit) for at, members in rows.items()}
        trainer = ShardedTrainer(plan, replica, stages, encoded, emit)
        manifest.write(output)
        trainer.run()
        held_out = encode_rows(plan, base, split.held_out, "evaluation", emit)
        measure = evaluator(plan, emit)
        reports = {"before": _before(replica, trainer.start, lambda: measure(replica, held_out))}
        served, serving = _serve(run, plan, stages, trainer.start, emit)
        reports["after"] = measure(served, held_out)
        summary = {
            "command": "tune",
            "steps": plan.recipe.steps,
            "rounds": 0,
            "clients": 1,
            **common_facts(run, serving, served, reports, time.monotonic() - started),
            "peak_rss_bytes": peak_rss(),
            "outputs": write_outputs(run, serving, served, None),
            "sharding": _standing(stages, manifest),
        }
        close(run, summary)
        return summary


def unlearn(run_path: Path, rows: str, emit: Emit) -> dict[str, Any]:
    """Forget the rows of a file: delete every stage that has seen their slices and serve what is left.

    Raises RunError when none of them is in the run. Rows that other slices hold, too, go everywhere.
    """
    run, manifest = RunFolder(run_path), Manifest.read(run_path)
    plan = plan_of(manifest.recipe)
    with run.locked():
        asked = {row_id(row) for row in load_rows(rows)}
        found = asked & manifest.rows.keys()
        if not found:
            raise RunError(f"{rows}: none of its {len(asked)} rows is in {run_path}, so nothing was forgotten.")
        stages = Stages(run_path, plan, manifest)
        touched: dict[int, set[int]] = {}
        for row in found:
            shard, piece = manifest.rows[row]
            touched.setdefault(shard, set()).add(piece)
        dropped = sum(stages.drop(shard, pieces) for shard, pieces in touched.items())
        manifest.rows = {row: at for row, at in manifest.rows.items() if row not in found}
        manifest.forgotten += sorted(found)
        manifest.write(run_path)
        emit = recording(run, emit)
        start = Replica(open_base(plan, emit), plan)
        served, serving = _serve(run, plan, stages, start.trainable.wire, emit)
        write_outputs(run, serving, served, None)
        (run_path / SUMMARY).unlink(missing_ok=True)  # its figures are those of another model
        write_report(run)
        result = {
            "run": str(run_path),
            "rows": len(found),
            "not_in_the_run": len(asked - found),
            "stages_deleted": dropped,
            "digest": served.digest(),
            **_standing(stages, manifest),
        }
        run.record({"event": "unlearned", **result})
        return result


def _settled(
    plan: Plan, base_digest: str, folder: Path, rows: list[Row]
) -> tuple[Manifest, dict[tuple[int, int], list[Row]]]:
    """Where every row belongs; what was forgotten stays out even if the data still hold it."""
    forgotten: list[str] = []
    if (folder / SLICES).exists():
        before = Manifest.read(folder)
        if (plan_of(before.recipe).id, before.base_digest) != (plan.id, base_digest):
            raise RunError(f"{folder}: this run follows another recipe or base. Use another --output.")
        forgotten = before.forgotten
    section, places, slices = plan.recipe.sharding, dict[str, tuple[int, int]](), dict[tuple[int, int], list[Row]]()
    for row in rows:
        name = row_id(row)
        if name not in forgotten:
            places[name] = place(name, plan.recipe.seed, section.shards, section.slices)
            slices.setdefault(places[name], []).append(row)
    return Manifest(plan.resolved(), base_digest, places, forgotten), slices


# -- what is served ---------------------------------------------------------------------------------------------------


def _serve(run: RunFolder, plan: Plan, stages: Stages, start: Tensors, emit: Emit) -> tuple[Replica, Plan]:
    """Write the mean of the shards as the run's checkpoint, under a recipe whose rank is all of theirs."""
    count = len(stages.shards)
    parts = [{**start, **stages.tensors(shard, stages.best(shard))} for shard in stages.shards]
    serving = widened(plan, count)
    replica = Replica(open_base(serving, emit), serving)
    replica.trainable.restore(side_by_side(parts))
    tensors = {f"state/{name}": value for name, value in replica.trainable.state().items()}
    facts = {"step": str(plan.recipe.steps), "recipe_id": serving.id, "base_digest": replica.base.digest}
    write_tensors(run.path / CHECKPOINT, tensors, facts)
    run.write_recipe(serving)
    shutil.rmtree(run.path / "adapter", ignore_errors=True)  # nothing forgotten may stay, whatever happens next
    return replica, serving


def side_by_side(parts: list[Tensors]) -> Tensors:
    """Factors of the mean change: A_1 .. A_N under each other, B_1/N .. B_N/N beside each other."""
    joined = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        down = "lora_A" in name
        joined[name] = torch.cat(values, 0) if down else torch.cat([value / len(parts) for value in values], 1)
    return joined


def widened(plan: Plan, count: int) -> Plan:
    """The plan with `count` times the rank and the same scale."""
    content = plan.resolved()
    config = dict(content["parametrization"]["config"])
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    factor = math.sqrt(count) if config.get("use_rslora") else count
    config |= {"r": rank * count, "lora_alpha": alpha * factor}
    content["parametrization"] = {**content["parametrization"], "config": config}
    return build(content, "tune")


def _before(replica: Replica, start: Tensors, measure: Any) -> EvaluationReport:
    replica.trainable.restore(start)
    report: EvaluationReport = measure()
    return report


def _standing(stages: Stages, manifest: Manifest) -> dict[str, Any]:
    """Per shard: the slices that are served, and how many more deletions surely leave something of it."""
    length = len(stages.orders[0])
    deleted = [{p for p in range(length) if not _first(stages, shard, p)} for shard in stages.shards]
    return {
        "serving": [list(stages.best(shard)) for shard in stages.shards],
        "survives": [surely_survives(stages.orders, gone) for gone in deleted],
        "train_again": [shard for shard in stages.shards if not stages.best(shard)],
        "rows_left": len(manifest.rows),
    }


def _first(stages: Stages, shard: int, piece: int) -> bool:
    return stages.holds(shard, (piece,))
