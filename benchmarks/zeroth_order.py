"""Zeroth-order steps: a step against the two forward passes it needs, its memory against inference's, and MeZO's loop.

    python benchmarks/zeroth_order.py --data clinc150.jsonl.gz --output runs/bench/zeroth_order

Steps and forward passes see the same batches of the embedded model, in turns. Rates are fixed, so that no
step measures its own (`optimizer.lr: auto` adds 11 forward passes every 20 steps). Rows of another file in the same
folder, dolly.jsonl.gz, are the long ones. The published loop (MeZO) is written here plainly: the weights go to +eps,
-eps and back in place, and the Gaussian noise of every tensor is drawn anew from the seed each time.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kilotune  # noqa: F401 - before torch, so that its threads wait as in a run

# isort: split
import torch
from torch import nn

from common import Measurement, paired_seconds, write_measurements
from kilotune.core.rng import stream
from kilotune.core.trainable import Trainable
from kilotune.engine.composing.compose import build, read
from kilotune.engine.composing.plan import Plan
from kilotune.engine.model.base import Base, load_base
from kilotune.engine.rows.batches import micro_batches
from kilotune.engine.rows.data import load_rows
from kilotune.engine.rows.tokenize import Example, encode
from kilotune.engine.training.step import BatchObjective, Memory, train_step

PAIRS, LONG_PAIRS, MEZO_PAIRS = 6, 3, 2
SPEED, SPACE, FASTER = 1.15, 1.1, 2.0
EPSILON = 1e-3
STEPS_BACK = 100
RECIPES = {"kilotune_zeroth": "subspace, tiled", "local_mezo": "all weights"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSON Lines; dolly.jsonl.gz beside it is used too")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/zeroth_order"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=["time", "memory", "loop", "bits"], help="parts to run")
    parser.add_argument("--process", choices=["inference", *RECIPES], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.process:
        print(json.dumps(peak_of(args.process, args.data)))
        return
    rows: list[Measurement] = []
    notes = [f"{args.threads} threads, load average at the start {os.getloadavg()[0]:.1f}."]
    if "memory" in args.only:
        rows += memory(args.data)
    long = args.data.parent / "dolly.jsonl.gz"
    if {"time", "loop", "bits"} & set(args.only):
        base = load_base("smollm2-135m", writable=True)
        for recipe, label in RECIPES.items():
            setting = Setting(base, recipe)
            if "time" in args.only:
                for path, size, pairs in ((args.data, 16, PAIRS), (long, 8, LONG_PAIRS)):
                    if path.exists():
                        rows.append(step_time(setting, label, path, size, pairs))
            if "loop" in args.only:
                rows.append(against_the_loop(setting, label, args.data))
            if "time" in args.only:
                notes.append(profile(setting, label, args.data))
    if "bits" in args.only:
        rows.append(bits_after_many_steps(base))
    notes.append(f"Load average at the end {os.getloadavg()[0]:.1f}.")
    write_measurements(args.output, "Zeroth-order steps", rows, notes)


class Setting:
    """A recipe attached to the base, as a run would do it."""

    def __init__(self, base: Base, recipe: str) -> None:
        content = read(recipe) | {"data": {"path": "unused.jsonl", "system": ""}}
        self.plan: Plan = build(content, "tune" if content.get("steps") else "federate")
        self.base = base
        self.trainable: Trainable = self.plan.parametrization.attach(base.model, basis=self.plan.basis, seed=0)
        if self.plan.parametrization.uses_basis:
            self.trainable.begin(1, self.plan.estimator.forward_only)
        self.optimizer = self.plan.optimizer.model_copy(update={"lr": 1e-9})
        self.memory, self.steps = Memory.empty(), 0

    def objective(self, path: Path, size: int) -> BatchObjective:
        """One batch of the file's first training rows that fit whole."""
        examples, _ = encode(training_rows(path, 4 * size), self.base.tokenizer, self.plan.recipe.data)
        chosen: list[Example] = examples[:size]
        pad = self.base.tokenizer.pad_token_id
        return BatchObjective(self.trainable.model, micro_batches(chosen, self.plan.recipe, self.trainable.model, pad))

    def step(self, objective: BatchObjective) -> None:
        """One training step."""
        self.steps += 1
        rng = stream(0, "step", self.steps)
        train_step(self.trainable, self.plan.estimator, self.optimizer, objective, self.memory, 1.0, rng)


def training_rows(path: Path, count: int) -> list[Any]:
    """Rows of one client, where there are clients: what a batch on a device looks like."""
    rows = [row for row in load_rows(str(path)) if row.split == "train"]
    return [row for row in rows if row.client == rows[0].client][:count]


@torch.no_grad()
def forward(objective: BatchObjective, times: int) -> None:
    """Plain forward passes over the batch."""
    for _ in range(times):
        for part in objective.parts():
            float(part())


def tokens(objective: BatchObjective) -> str:
    """Its size in words."""
    batches = objective._batches
    return f"{sum(b.input_ids.numel() for b in batches)} tokens, {sum(b.num_labels for b in batches)} labelled"


def step_time(setting: Setting, label: str, path: Path, size: int, pairs: int) -> Measurement:
    """A whole training step against two forward passes over its batch."""
    objective = setting.objective(path, size)
    ours, two = paired_seconds(lambda: setting.step(objective), lambda: forward(objective, 2), pairs)
    what = f"step, {label}, {path.name.split('.')[0]}, {size} rows ({tokens(objective)})"
    return row(what, ours, "two forward passes", two, SPEED, headline=size == 16 and "tiled" in label)


def row(
    what: str,
    ours: Sequence[float],
    name: str,
    baseline: Sequence[float],
    target: float,
    *,
    faster: bool = False,
    headline: bool = False,
) -> Measurement:
    """Ours to the baseline, or how many times faster we are, by the fastest of each: on a shared machine a second of
    products takes one to two and a half, and what others do to it is no part of either."""
    ratios = [b / a if faster else a / b for a, b in zip(ours, baseline, strict=True)]
    best = min(baseline) / min(ours) if faster else min(ours) / min(baseline)
    return Measurement(
        what,
        f"{min(ours):.2f} s",
        f"{name}: {min(baseline):.2f} s",
        best,
        target,
        "higher" if faster else "lower",
        f"fastest of {len(ours)}; medians {statistics.median(ours):.2f} and {statistics.median(baseline):.2f} s, "
        f"pairs {min(ratios):.2f}-{max(ratios):.2f}",
        headline,
    )


def profile(setting: Setting, label: str, path: Path) -> str:
    """Where a step's time beyond its products goes: making the changed weights, and the update."""
    objective = setting.objective(path, 8)
    setting.step(objective)
    trainable: Any = setting.trainable
    fill, slope = trainable._fill, trainable.slope
    spent, calls = {"fill": 0.0, "slope": 0.0}, 0

    def timed(key: str, call: Callable[..., None]) -> Callable[..., None]:
        def count(*args: Any) -> None:
            nonlocal calls
            started = time.perf_counter()
            call(*args)
            spent[key] += time.perf_counter() - started
            calls += key == "fill"

        return count

    trainable._fill, trainable.slope = lambda *coords: timed("fill", fill(*coords)), timed("slope", slope)
    started = time.perf_counter()
    setting.step(objective)
    whole = time.perf_counter() - started
    del trainable._fill, trainable.slope
    return (
        f"Profile of one step, {label}, 8 rows: {whole:.2f} s, of which {spent['fill']:.2f} s in {calls} calls that "
        "write changed weights into scratch (noise, sum and the reading of the weights, which the products find in the "
        f"cache then), and {spent['slope']:.2f} s in the update, which for all weights reads and writes each of "
        "them once more and makes its noise again; two forward passes do neither."
    )


# -- memory -----------------------------------------------------------------------------------------------------------


def memory(data: Path) -> list[Measurement]:
    """Peak resident memory of three steps against that of three forward passes, a process each."""
    peaks = {}
    for process in ("inference", *RECIPES):
        words = [sys.executable, __file__, "--data", str(data), "--process", process]
        found = subprocess.run(words, check=True, capture_output=True, text=True)
        peaks[process] = json.loads(found.stdout.splitlines()[-1])
    base = peaks.pop("inference")
    return [
        Measurement(
            f"peak memory, {RECIPES[recipe]}, 16 rows",
            f"{peak / 2**30:.2f} GiB",
            f"inference: {base / 2**30:.2f} GiB",
            peak / base,
            SPACE,
            "lower",
            "1 process each",
            recipe == "kilotune_zeroth",
        )
        for recipe, peak in peaks.items()
    ]


def peak_of(process: str, data: Path) -> int:
    """In a process of its own: bytes at the peak."""
    base = load_base("smollm2-135m", writable=True)
    setting = Setting(base, "kilotune_zeroth" if process == "inference" else process)
    objective = setting.objective(data, 16)
    for _ in range(3):
        if process == "inference":
            forward(objective, 1)
        else:
            setting.step(objective)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -- the published loop -----------------------------------------------------------------------------------------------


def add_noise(params: list[nn.Parameter], seed: int, scale: float) -> None:
    """w <- w + scale * z in place, z drawn anew, tensor after tensor."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        z = torch.normal(0.0, 1.0, param.shape, generator=generator)
        param.data.add_(z, alpha=scale)


@torch.no_grad()
def mezo_step(params: list[nn.Parameter], objective: BatchObjective, seed: int, rate: float) -> None:
    """Malladi et al., algorithm 1: perturb, pass, perturb twice as far back, pass, restore, update."""
    losses = []
    for scale in (EPSILON, -2 * EPSILON):
        add_noise(params, seed, scale)
        losses.append(sum(float(part()) for part in objective.parts()))
    add_noise(params, seed, EPSILON)
    add_noise(params, seed, -rate * (losses[0] - losses[1]) / (2 * EPSILON))


def against_the_loop(setting: Setting, label: str, data: Path) -> Measurement:
    """Our step against one of the in-place loop over all weights; the weights are put back afterwards."""
    objective = setting.objective(data, 8)
    params = list(setting.base.parameters().values())
    stored = [param.data.clone() for param in params]
    ours, loop = paired_seconds(
        lambda: setting.step(objective), lambda: mezo_step(params, objective, 7, 1e-9), MEZO_PAIRS
    )
    for param, value in zip(params, stored, strict=True):
        param.data.copy_(value)
    what = f"times faster than the in-place loop, {label}, 8 rows"
    return row(what, ours, "MeZO's loop", loop, FASTER, faster=True, headline="tiled" in label)


@torch.no_grad()
def bits_after_many_steps(base: Base) -> Measurement:
    """Probes without an update on the weights of one layer: the share of weights that are no longer what they were."""
    from kilotune.core.trainable import Direction
    from kilotune.parametrization.full import Full

    trainable: Any = Full(targets=("layers.0.mlp",)).attach(base.model, basis=None, seed=0)
    params = list(trainable.params.values())
    before = [param.data.clone() for param in params]
    mlp = base.model.get_decoder().layers[0].mlp
    x = torch.linspace(-1, 1, 4 * base.model.config.hidden_size).view(4, -1)

    def share() -> float:
        changed = sum(int((p.data != b).sum()) for p, b in zip(params, before, strict=True))
        return changed / sum(b.numel() for b in before)

    for step in range(STEPS_BACK):
        trainable.both(Direction(step), EPSILON, [lambda: mlp(x).sum()])
    ours = share()
    for step in range(STEPS_BACK):
        for scale in (EPSILON, -2 * EPSILON, EPSILON):
            add_noise(params, step, scale)
    loop = share()
    for param, value in zip(params, before, strict=True):
        param.data.copy_(value)
    what = f"weights changed by {STEPS_BACK} probes without an update, one feed-forward block"
    return Measurement(what, f"{ours:.1%}", f"MeZO's loop: {loop:.1%}", ours / loop, 0.0, "lower", headline=True)


if __name__ == "__main__":
    main()
