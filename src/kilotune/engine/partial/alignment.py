"""Alignment: the thinned middle of a model learns, on rows of the server, to give what the full middle gives.

loss = w · kd + (1 - w) · lm, w = align_kd, kd = mean(((T - S) / rms(T))²): T is what the full middle gives, S what the
thin one gives for the same input, lm is the thin model's loss on the answers. The ends stay as they are.

Source: Xiao, Lin and Han, "Offsite-Tuning: Transfer Learning without Full Model", arXiv 2302.04870, sec. 3.3, with the
    weights and the rms of its published code.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kilotune.core.errors import RunError
from kilotune.core.rng import derive, stream
from kilotune.core.trainable import Trainable
from kilotune.core.types import Batch
from kilotune.engine.files import read_tensors, write_tensors
from kilotune.engine.model.compute import Compute
from kilotune.engine.model.loss import answer_loss
from kilotune.engine.partial.middle import Middle
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rows.batches import BatchSampler, micro_batches
from kilotune.engine.rows.tokenize import Example
from kilotune.engine.training.step import Memory, train_step
from kilotune.estimator import Objective
from kilotune.estimator.backprop import Backprop
from kilotune.optimizer.adamw import AdamW
from kilotune.parametrization.full import Full

__all__ = ["align", "kd_loss", "load_aligned"]

FILE = "emulator.safetensors"
Emit = Callable[[dict[str, Any]], None]


def kd_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """() mean(((T - S) / rms(T))²); zero for equal outputs."""
    return (teacher - student).square().mean() / teacher.square().mean()


class _Both(nn.Module):
    """Runs a block of the full middle beside the emulator's, each on what its own predecessors gave."""

    def __init__(self, teacher: nn.Module, student: nn.Module | None, outputs: dict[str, Tensor], first: bool) -> None:
        super().__init__()
        self._blocks, self._outputs, self._first = (teacher, student), outputs, first

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        teacher, student = self._blocks
        with torch.no_grad():
            before = hidden_states if self._first else self._outputs["teacher"]
            self._outputs["teacher"] = teacher(before, *args, **kwargs)
        output: Tensor = hidden_states if student is None else student(hidden_states, *args, **kwargs)
        self._outputs["student"] = output
        return output


class _Matching(Objective):
    """The loss on these rows; batches count by their labels. `kd` is what its parts have measured so far."""

    def __init__(self, replica: Replica, rows: list[Example], outputs: dict[str, Tensor]) -> None:
        recipe, self._model = replica.plan.recipe, replica.model
        self._weight, self._outputs, self.kd = recipe.emulator.align_kd, outputs, 0.0
        self._compute = replace(Compute.of(recipe), checkpointing=0.0)
        self._batches = micro_batches(rows, recipe, self._model, replica.base.tokenizer.pad_token_id)
        self._count = sum(batch.num_labels for batch in self._batches)

    def parts(self) -> list[Callable[[], Tensor]]:
        return [partial(self._part, batch) for batch in self._batches]

    def _part(self, batch: Batch) -> Tensor:
        share = batch.num_labels / self._count
        with self._compute.around(self._model):
            lm = answer_loss(self._model, batch)
            kd = kd_loss(self._outputs["teacher"], self._outputs["student"])
        self.kd += share * float(kd.detach())
        return share * (self._weight * kd + (1 - self._weight) * lm)


def align(replica: Replica, examples: Sequence[Example], emit: Emit) -> list[float]:
    """Train copies of the kept blocks on these examples and run them from then on; returns kd before every step.

    Beside the full model, which stays as it is, the copies and their moments are resident meanwhile, and the gradient
    of one tensor, or of all where a step takes several micro-batches.
    """
    middle, recipe = _middle(replica), replica.plan.recipe
    section, rule, memory = recipe.emulator, AdamW(lr=recipe.emulator.align_lr), Memory.empty()
    students, outputs = middle.copied(), dict[str, Tensor]()
    left = middle.layout.left
    middle.place({at: _Both(one, students.get(at), outputs, at == left) for at, one in middle.full.items()})
    trainable, history = _trainable(students), list[float]()
    sampler = BatchSampler(len(examples), recipe.batch_size, derive(recipe.seed, "align"))
    try:
        for step in range(section.align_steps):
            objective = _Matching(replica, [examples[i] for i in sampler.indices(step)], outputs)
            train_step(trainable, Backprop(), rule, objective, memory, 1.0, stream(recipe.seed, "align", step))
            history.append(objective.kd)
            emit({"event": "progress", "what": "aligning", "done": step + 1, "total": section.align_steps})
    finally:
        middle.kept = students
        middle.thin()
    emit({"event": "aligned", "steps": len(history), "kd_first": history[0], "kd_last": history[-1]})
    return history


def load_aligned(replica: Replica, folder: Path, encode: Callable[[str], list[Example]], emit: Emit) -> None:
    """The aligned emulator of a run folder, made when it is not there; nothing where the recipe aligns nothing.

    `encode` gives the rows of a file as examples.
    """
    section = replica.plan.recipe.emulator
    if not section.align_steps or section.align_path is None:
        return
    middle, path = _middle(replica), folder / FILE
    about = {"recipe_id": replica.plan.id, "base_digest": replica.base.digest}
    if not path.exists():
        align(replica, encode(section.align_path), emit)
        write_tensors(path, _trainable(middle.kept).state(), about)
        return
    stored, facts = read_tensors(path)
    if facts != about:
        raise RunError(f"{path}: is the emulator of another recipe or base. Use another --output.")
    middle.kept = middle.copied()
    _trainable(middle.kept).restore(stored)
    middle.thin()


def _middle(replica: Replica) -> Middle:
    if replica.middle is None:
        raise RunError("align: this recipe has no emulator. Give emulator.left and emulator.right.")
    return replica.middle


def _trainable(blocks: dict[int, nn.Module]) -> Trainable:
    """All their weights, by block and name."""
    return Full().attach(nn.ModuleDict({str(at): block for at, block in blocks.items()}), basis=None, seed=0)
