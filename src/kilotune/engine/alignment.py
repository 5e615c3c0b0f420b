"""Alignment: the thinned middle of a model learns, on rows of the server, to give what the full middle gives.

loss = w · kd + (1 - w) · lm, w = align_kd, kd = mean(((T - S) / rms(T))²): T is what the full middle gives, S what the
thin one gives for the same input, lm is the thin model's loss on the answers. The ends stay as they are.

Source: Xiao, Lin and Han, "Offsite-Tuning: Transfer Learning without Full Model", arXiv 2302.04870, sec. 3.3, with the
    weights and the rms of its published code.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kilotune.core.errors import RunError
from kilotune.core.rng import derive
from kilotune.engine.batches import BatchSampler, micro_batches
from kilotune.engine.compute import Compute
from kilotune.engine.files import read_tensors, write_tensors
from kilotune.engine.loss import answer_loss
from kilotune.engine.middle import Middle
from kilotune.engine.replica import Replica
from kilotune.engine.tokenize import Example
from kilotune.optimizer.adamw import AdamW

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


def align(replica: Replica, examples: Sequence[Example], emit: Emit) -> list[float]:
    """Train copies of the kept blocks on these examples and run them from then on; returns kd before every step.

    Beside the full model, which stays as it is, the copies, their moments and one gradient are resident meanwhile.
    """
    middle, recipe = _middle(replica), replica.plan.recipe
    section, rule = recipe.emulator, AdamW(lr=recipe.emulator.align_lr)
    students, outputs = middle.copied(), dict[str, Tensor]()
    left = middle.layout.left
    middle.place({at: _Both(one, students.get(at), outputs, at == left) for at, one in middle.full.items()})
    params, history = _tensors(students), list[float]()
    states = {name: rule.init(param) for name, param in params.items()}
    sampler = BatchSampler(len(examples), recipe.batch_size, derive(recipe.seed, "align"))
    try:
        for param in params.values():
            param.requires_grad_(True)
        for step in range(section.align_steps):
            rows = [examples[i] for i in sampler.indices(step)]
            gradients, kd = _gradients(replica, rows, params, outputs)
            for name, param in params.items():
                param.data.add_(rule.update(gradients[name], states[name], param.data, section.align_lr))
            history.append(kd)
            emit({"event": "progress", "what": "aligning", "done": step + 1, "total": section.align_steps})
    finally:
        for param in params.values():
            param.requires_grad_(False)
        middle.kept = students
        middle.thin()
    emit({"event": "aligned", "steps": len(history), "kd_first": history[0], "kd_last": history[-1]})
    return history


def _gradients(
    replica: Replica, rows: list[Example], params: dict[str, nn.Parameter], outputs: dict[str, Tensor]
) -> tuple[dict[str, Tensor], float]:
    """Of the loss on these rows, and its kd; batches count by their labels."""
    recipe, model = replica.plan.recipe, replica.model
    weight, compute = recipe.emulator.align_kd, replace(Compute.of(recipe), checkpointing=0.0)
    batches = micro_batches(rows, recipe, model, replica.base.tokenizer.pad_token_id)
    total, kd = sum(batch.num_labels for batch in batches), 0.0
    sums = {name: torch.zeros_like(param) for name, param in params.items()}
    for batch in batches:
        share = batch.num_labels / total
        with compute.around(model):
            lm = answer_loss(model, batch)
            distance = kd_loss(outputs["teacher"], outputs["student"])
        loss = share * (weight * distance + (1 - weight) * lm)
        for name, gradient in zip(params, torch.autograd.grad(loss, list(params.values())), strict=True):
            sums[name] += gradient
        kd += share * float(distance.detach())
    return sums, kd


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
        write_tensors(path, {name: param.data for name, param in _tensors(middle.kept).items()}, about)
        return
    stored, facts = read_tensors(path)
    if facts != about:
        raise RunError(f"{path}: is the emulator of another recipe or base. Use another --output.")
    middle.kept = middle.copied()
    for name, param in _tensors(middle.kept).items():
        param.data.copy_(stored[name])
    middle.thin()


def _middle(replica: Replica) -> Middle:
    if replica.middle is None:
        raise RunError("align: this recipe has no emulator. Give emulator.left and emulator.right.")
    return replica.middle


def _tensors(blocks: dict[int, nn.Module]) -> dict[str, nn.Parameter]:
    """Parameters by block and name, in a fixed order."""
    return {f"{at}.{name}": param for at in sorted(blocks) for name, param in blocks[at].named_parameters()}
