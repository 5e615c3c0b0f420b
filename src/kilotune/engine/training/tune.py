"""Tune: one machine, its own data. Subspace recipes run as a federation of one (so that they leave a ledger and a
seed file); every other parametrization runs the plain loop here, with checkpoints and exact resume.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kilotune.core.errors import RunError
from kilotune.core.rng import derive, stream
from kilotune.engine.composing.plan import Plan
from kilotune.engine.files import read_tensors, write_tensors
from kilotune.engine.interrupt import between_steps
from kilotune.engine.model.compute import Compute
from kilotune.engine.model.evaluation import EvaluationReport
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rows.batches import BatchSampler, micro_batches
from kilotune.engine.rows.tokenize import Example
from kilotune.engine.training.step import BatchObjective, Memory, rate, train_step

CHECKPOINT = "checkpoint.safetensors"
CHECKPOINTS_PER_RUN = 10

Emit = Callable[[dict[str, Any]], None]


class Trainer:
    """The local loop: step, evaluate, checkpoint, stop early."""

    def __init__(
        self,
        plan: Plan,
        replica: Replica,
        train: list[Example],
        evaluate: Callable[[Replica], EvaluationReport],
        folder: Path,
        emit: Emit,
    ) -> None:
        self.plan, self.replica, self.train = plan, replica, train
        self.evaluate, self.folder, self.emit = evaluate, folder, emit
        self.memory = Memory.empty()
        self.step = 0

    def run(self) -> dict[str, EvaluationReport]:
        """All steps that are missing; returns the evaluations before (when starting) and after."""
        recipe = self.plan.recipe
        total = recipe.steps or 0
        before = None
        if not self._resume():
            before = self._measure()
            self._prepare()
        save_every = max(1, min(total // CHECKPOINTS_PER_RUN, 100))
        sampler = BatchSampler(len(self.train), recipe.batch_size, derive(recipe.seed, "batches", "local"))
        best, without_gain, last = math.inf, 0, None
        while self.step < total:
            with between_steps() as interrupt:
                self._one_step(sampler, total)
                if interrupt.requested:
                    self._save()
                    raise KeyboardInterrupt
            last = None
            if recipe.evaluation.every and self.step % recipe.evaluation.every == 0 and self.step < total:
                last = self._measure()
                without_gain = 0 if last.overall.loss < best else without_gain + 1
                best = min(best, last.overall.loss)
            if self.step % save_every == 0 or self.step == total:
                self._save()
            if recipe.patience and without_gain >= recipe.patience:
                self.emit({"event": "stopped", "step": self.step, "why": "no better loss"})
                self._save()
                break
        after = last if last is not None else self._measure()
        return {"after": after} | ({"before": before} if before is not None else {})

    def _prepare(self) -> None:
        """Let the parametrization look at some rows, if it wants to."""
        recipe, method = self.plan.recipe, self.plan.parametrization
        if not method.looks_at:
            return
        chosen = stream(recipe.seed, "prepare").permutation(len(self.train))[: method.looks_at]
        rows = [self.train[i] for i in chosen]
        self.emit({"event": "status", "text": f"looking at {len(rows)} rows to start from"})
        batches = micro_batches(rows, recipe, self.replica.model, self.replica.base.tokenizer.pad_token_id)
        objective = BatchObjective(self.replica.model, batches, Compute.of(recipe))
        method.prepare(self.replica.trainable, objective.parts(), recipe.seed)

    def _one_step(self, sampler: BatchSampler, total: int) -> None:
        started = time.monotonic()
        recipe = self.plan.recipe
        rows = [self.train[i] for i in sampler.indices(self.step)]
        batches = micro_batches(rows, recipe, self.replica.model, self.replica.base.tokenizer.pad_token_id)
        factor = rate(recipe.lr_schedule, recipe.warmup_frac, self.step / total)
        rng = stream(recipe.seed, "step", "local", self.step)
        report = train_step(
            self.replica.trainable,
            self.plan.estimator,
            self.plan.optimizer,
            BatchObjective(self.replica.model, batches, Compute.of(recipe)),
            self.memory,
            factor,
            rng,
        )
        if not math.isfinite(report.loss):
            raise RunError(
                f"step {self.step + 1}: the loss is {report.loss}. Lower optimizer.lr; the last checkpoint is kept."
            )
        self.step += 1
        seconds = time.monotonic() - started
        tokens = sum(batch.num_labels for batch in batches)
        self.emit({"event": "step", "step": self.step, "loss": report.loss, "tokens": tokens, "seconds": seconds})

    def _measure(self) -> EvaluationReport:
        report = self.evaluate(self.replica)
        self.emit({"event": "evaluation", "step": self.step, **report.to_json()})
        return report

    def _save(self) -> None:
        tensors = {f"state/{k}": v for k, v in self.replica.trainable.state().items()}
        tensors |= {f"memory/{k}": v for k, v in self.memory.tensors().items()}
        facts = {"step": str(self.step), "recipe_id": self.plan.id, "base_digest": self.replica.base.digest}
        write_tensors(self.folder / CHECKPOINT, tensors, facts)

    def _resume(self) -> bool:
        path = self.folder / CHECKPOINT
        if not path.exists():
            return False
        tensors, facts = read_tensors(path)
        if facts["recipe_id"] != self.plan.id or facts["base_digest"] != self.replica.base.digest:
            raise RunError(
                f"{self.folder}: its checkpoint follows recipe {facts['recipe_id']} on base "
                f"{facts['base_digest'][:16]}, got {self.plan.id} on {self.replica.base.digest[:16]}. "
                "Use the same recipe to resume, or another --output."
            )
        state = {k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")}
        self.replica.trainable.restore(state)
        memory = {k.removeprefix("memory/"): v for k, v in tensors.items() if k.startswith("memory/")}
        self.memory = Memory.from_tensors(memory)
        self.step = int(facts["step"])
        self.emit({"event": "resumed", "step": self.step})
        return True
