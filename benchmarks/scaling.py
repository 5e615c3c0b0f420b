"""Scaling: how time, memory and bytes grow with the model, the basis, the seeds, the clients and the sequence.

    python benchmarks/scaling.py --output runs/bench/scaling

Least-squares exponents in log-log beside what the design promises; one SVG per quantity in the output folder; and, on
paper, what a model of 7 and of 70 billion weights would cost a device per round. Every point is a process of its own.
"""

import argparse
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import Measurement, alone, write_measurements

# hidden width, layers: Llamas with a feed-forward of 8/3 widths and a vocabulary of 2,048
SIZES = {"1M": (96, 7), "4M": (192, 8), "16M": (320, 12), "64M": (576, 15), "135M": (768, 18), "500M": (1280, 25)}
VOCABULARY = 2048
ROWS, LENGTH = 2, 64
BASIS = [2**n for n in range(8, 19, 2)]
SEEDS = [2**n for n in range(6, 17, 2)]
CLIENTS = [10, 100, 1000, 10_000]
LENGTHS = [64, 128, 256, 512, 1024]
PAPER = {"7B": 7e9, "70B": 70e9}
LOCAL_STEPS = 5
TOLERANCE = 0.1  # an exponent is kept when it is at most this much above the promise


@dataclass(frozen=True)
class Curve:
    """Readings of one quantity and the exponent that was promised."""

    what: str
    unit: str
    promised: float
    xs: list[float]
    ys: list[float]
    why: str = ""  # said when the exponent differs from the promise

    def fitted(self) -> float:
        """Slope of the least-squares line in log-log."""
        return float(np.polyfit(np.log(self.xs), np.log(self.ys), 1)[0])

    def between(self) -> list[float]:
        """Exponents between neighbouring points."""
        return [float(e) for e in np.diff(np.log(self.ys)) / np.diff(np.log(self.xs))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/scaling"))
    parser.add_argument("--only", nargs="*", choices=AXES, help="axes to measure; default: all")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)  # this script calling itself
    args = parser.parse_args()
    if args.part:
        name, *words = args.part
        print(json.dumps(WORKERS[name](*words)))
        return
    notes = [f"An exponent hits when it is at most {TOLERANCE} above the promise: nothing grows faster than promised."]
    curves: list[Curve] = []
    for axis in args.only or AXES:
        began, load = time.monotonic(), os.getloadavg()[0]
        curves += AXES[axis](notes)
        print(f"{axis}: {time.monotonic() - began:.0f} s, load average before {load:.1f}", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    for curve in curves:
        draw(args.output, curve)
    notes += [told(curve) for curve in curves]
    notes += [f"{c.what}: {c.why}" for c in curves if c.why and abs(c.fitted() - c.promised) > TOLERANCE]
    notes.append(f"Load average at the end: {os.getloadavg()[0]:.1f}. Charts: {args.output.name}/*.svg.")
    write_measurements(args.output, "Scaling", [row(curve) for curve in curves], notes)


def row(curve: Curve) -> Measurement:
    steps = curve.between()
    largest = Curve(curve.what, curve.unit, curve.promised, curve.xs[-3:], curve.ys[-3:])
    return Measurement(
        f"{curve.what}: exponent",
        f"{curve.fitted():.2f}",
        f"promised {curve.promised:g}",
        max(curve.fitted(), 0.0),
        curve.promised + TOLERANCE,
        "lower",
        f"{len(curve.xs)} points, neighbours {min(steps):.2f}-{max(steps):.2f}; largest three {largest.fitted():.2f}",
    )


def told(curve: Curve) -> str:
    points = ", ".join(f"{x:.4g}: {y:.4g}" for x, y in zip(curve.xs, curve.ys, strict=True))
    return f"{curve.what} ({curve.unit}): {points}."


# -- axes ---------------------------------------------------------------------------------------------------------


def model_size(notes: list[str]) -> list[Curve]:
    """Same tokens, models of 1 to 500 million weights."""
    found = [alone(__file__, "step", size, 4096, ROWS, LENGTH) for size in SIZES]
    xs = [f["weights"] for f in found]
    small = (
        "small models pay a fixed time per layer and call, so the line is flatter than its upper end; between the "
        "largest neighbours it is the promised one."
    )
    curves = [
        Curve("step by backpropagation, time by weights", "s", 1, xs, [f["step_s"] for f in found], small),
        Curve("zeroth-order step, time by weights", "s", 1, xs, [f["zeroth_s"] for f in found], small),
        Curve("replay of a round, time by weights", "s", 1, xs, [f["replay_s"] for f in found], small),
        Curve("backpropagation, memory by weights", "bytes", 1, xs, [f["step_bytes"] for f in found], FLOOR),
        Curve("zeroth order, memory by weights", "bytes", 1, xs, [f["zeroth_bytes"] for f in found], FLOOR),
        Curve("payload of a client by weights", "bytes", 0, xs, [f["up_bytes"] for f in found]),
    ]
    notes += on_paper(found)
    return curves


FLOOR = (
    "what is counted is memory beyond the process before it had a model; allocator and kernels' buffers are a floor of "
    "some megabytes that small models cannot go below."
)


def basis_size(notes: list[str]) -> list[Curve]:
    """The 16M model with 2^8 to 2^18 coefficients."""
    found = [alone(__file__, "step", "16M", size, ROWS, LENGTH) for size in BASIS]
    xs = [float(size) for size in BASIS]
    near = (
        "every tensor adds to M sums, or reads M coefficients, whatever its size; tensors of this model have a hundred "
        "to 650 thousand numbers, so from M = 2^16 on that weighs as much as the tensor. Below, the curve is flat."
    )
    return [
        Curve("step by backpropagation, time by M", "s", 0, xs, [f["step_s"] for f in found], near),
        Curve("replay of a round, time by M", "s", 0, xs, [f["replay_s"] for f in found], near),
        Curve("backpropagation, memory by M", "bytes", 0, xs, [f["step_bytes"] for f in found]),
        Curve("payload of a client by M", "bytes", 1, xs, [f["up_bytes"] for f in found]),
    ]


def seeds(notes: list[str]) -> list[Curve]:
    """64 to 65,536 pairs of direction and scalar over the 16M model."""
    found = [alone(__file__, "pairs", count) for count in SEEDS]
    xs = [float(count) for count in SEEDS]
    flat = (
        "the Walsh-Hadamard transform and the pass over the weights do not see how many pairs there were; sorting and "
        "summing the pairs by direction does, and shows in the largest number alone."
    )
    return [
        Curve("tiled, replay of pairs, time by pairs", "s", 0, xs, [f["tiled_s"] for f in found], flat),
        Curve("seeds basis, replay, time by pairs", "s", 1, xs[:3], [f["seeds_s"] for f in found[:3]]),
        Curve("aggregation of pairs, time by pairs", "s", 1, xs, [f["sum_s"] for f in found], CALLS),
        Curve("payload by pairs", "bytes", 1, xs, [f["bytes"] for f in found]),
    ]


CALLS = "fixed costs of a call weigh on the few small points; between the largest neighbours it is the promised one."


def clients(notes: list[str]) -> list[Curve]:
    """10 to 10,000 clients: what a server adds up, and what a simulation of 20 client-rounds holds."""
    xs = [float(count) for count in CLIENTS]
    added = [alone(__file__, "add", count) for count in CLIENTS]
    with tempfile.TemporaryDirectory() as folder:
        from federation import save_tiny

        save_tiny(Path(folder) / "base")
        runs = [alone(__file__, "simulate", folder, count) for count in CLIENTS]
    per_client = "a run of ten clients is loading the model and little else; hello and rows count from a thousand on."
    return [
        Curve("aggregation, time by clients", "s", 1, xs, [f["seconds"] for f in added]),
        Curve("aggregation, memory by clients", "bytes", 0, xs, [f["bytes"] for f in added]),
        Curve("simulation, memory by enrolled clients", "bytes", 0, xs, [f["peak"] for f in runs]),
        Curve("simulation, time beyond steps by enrolled", "s", 1, xs, [f["rest_s"] for f in runs], per_client),
    ]


def sequence(notes: list[str]) -> list[Curve]:
    """Rows of 64 to 1,024 tokens through the 16M model."""
    found = [alone(__file__, "step", "16M", 4096, 1, length) for length in LENGTHS]
    xs = [float(length) for length in LENGTHS]
    fixed = "the update of the weights (M numbers and a pass over the weights) costs the same for any sequence."
    return [
        Curve("step by backpropagation, time by tokens", "s", 1, xs, [f["step_s"] for f in found], fixed),
        Curve("zeroth-order step, time by tokens", "s", 1, xs, [f["zeroth_s"] for f in found], fixed),
        Curve("backpropagation, memory by tokens", "bytes", 1, xs, [f["step_bytes"] for f in found], WEIGHTS),
        Curve("zeroth order, memory by tokens", "bytes", 1, xs, [f["zeroth_bytes"] for f in found], WEIGHTS),
    ]


WEIGHTS = "the weights themselves are most of it and do not grow with the row; activations do."
AXES: dict[str, Callable[[list[str]], list[Curve]]] = {
    "model_size": model_size,
    "basis_size": basis_size,
    "seeds": seeds,
    "clients": clients,
    "sequence": sequence,
}


def on_paper(found: list[dict[str, float]]) -> list[str]:
    """7B and 70B per device and round: through the largest measured model with the promised exponents, and beside it
    with the exponents fitted to the four largest."""
    xs, last, lines = [f["weights"] for f in found][-4:], found[-1], []

    def scaled(key: str, weights: float) -> tuple[float, float]:
        slope = float(np.polyfit(np.log(xs), np.log([f[key] for f in found][-4:]), 1)[0])
        ratio = weights / last["weights"]
        return last[key] * ratio, last[key] * ratio**slope

    def hours(key: str, weights: float) -> str:
        near, fit = (LOCAL_STEPS * seconds / 3600 for seconds in scaled(key, weights))
        return f"{near:.2g} h (fit {fit:.2g} h)"

    per_weight = {
        key: (found[-1][key] - found[-2][key]) / (found[-1]["weights"] - found[-2]["weights"])
        for key in ("step_bytes", "zeroth_bytes")
    }
    lines.append(
        f"Between the two largest models a weight costs {per_weight['step_bytes']:.2f} bytes with backpropagation (the "
        f"weight and its copy) and {per_weight['zeroth_bytes']:.2f} bytes with forward passes."
    )
    for name, weights in PAPER.items():
        memory, lean = (scaled(key, weights)[0] / 1e9 for key in ("step_bytes", "zeroth_bytes"))
        replay = scaled("replay_s", weights)
        lines += [
            f"On paper, {name}, a device and round of {LOCAL_STEPS} steps of {ROWS * LENGTH} tokens on this machine in "
            f"float32: backpropagation {hours('step_s', weights)} and {memory:.0f} GB; zeroth order "
            f"{hours('zeroth_s', weights)} and {lean:.0f} GB; replay of the round {replay[0]:.3g} s "
            f"(fit {replay[1]:.3g} s); {last['up_bytes']:,.0f} bytes up and {last['down_bytes']:,.0f} down at any size."
        ]
    return lines


# -- processes of their own -----------------------------------------------------------------------------------------


def step(size: str, basis: str, rows: str, length: str) -> dict[str, float]:
    """Replay, one zeroth-order step and one step by backpropagation, in the order of the memory they need."""
    import torch

    from kilotune.codec import TensorUpdate
    from kilotune.core.rng import stream
    from kilotune.engine.composing.compose import compose
    from kilotune.engine.model.base import Base
    from kilotune.engine.rounds.replica import Replica
    from kilotune.engine.rows.batches import micro_batches
    from kilotune.engine.training.step import BatchObjective, Memory, train_step

    import_all()
    before = rss()
    model = llama(size)
    parameters = dict(sorted(model.named_parameters()))
    base = Base(size, Path(), model, None, "", False, parameters)
    plans = {
        recipe: compose(recipe, "federate", [f"basis.size={basis}", "rounds=1", "micro_batch_tokens=4096"])
        for recipe in ("kilotune", "kilotune_zeroth")
    }
    replica = Replica(base, plans["kilotune"])
    batches = micro_batches(random_rows(int(rows), int(length)), plans["kilotune"].recipe, model, 0)
    weights = sum(p.numel() for p in parameters.values())
    result: dict[str, float] = {"weights": weights}
    coords = torch.from_numpy(stream(0, "coords").normal(size=int(basis)).astype(np.float32) * np.float32(1e-4))
    trainable, context = replica.trainable, replica.context(1)
    result["replay_s"] = timed(lambda: trainable.apply([("coords", coords)], 7), 3)
    result["up_bytes"] = len(plans["kilotune"].uplink.encode(TensorUpdate({"coords": coords}), context, {}))
    result["down_bytes"] = 32 + len(plans["kilotune"].downlink.encode(TensorUpdate({"coords": coords}), context, {}))
    objective = BatchObjective(model, batches)
    short = BatchObjective(model, micro_batches(random_rows(1, 8), plans["kilotune"].recipe, model, 0))
    for key, recipe in (("zeroth", "kilotune_zeroth"), ("step", "kilotune")):
        plan, memory = plans[recipe], Memory.empty()
        trainable.begin(3, plan.estimator.forward_only)

        def one(rows: BatchObjective, plan: Any = plan, memory: Memory = memory) -> None:
            train_step(trainable, plan.estimator, plan.optimizer, rows, memory, 1.0, stream(0, "step"))

        one(short)  # compiles, takes the copy that a rollback needs
        result[f"{key}_s"] = timed(lambda: one(objective), 3 if weights < 2e8 else 1, warm=False)
        trainable.rollback()
        result[f"{key}_bytes"] = peak() - before
    return result


def pairs(count: str) -> dict[str, float]:
    """Replay and aggregation of so many pairs; the seeds basis only as far as a minute allows."""
    import torch

    from kilotune.aggregation.seed_sum import SeedSum
    from kilotune.basis.seeds import Seeds
    from kilotune.basis.tiled import Tiled
    from kilotune.codec.seed_scalar import SeedScalar
    from kilotune.core.types import SeedUpdate, WireContext

    number, rng = int(count), np.random.default_rng(0)
    update = SeedUpdate(rng.integers(0, 65536, number), rng.normal(size=number).astype(np.float32) * np.float32(1e-6))
    weights = {f"w{i}": torch.from_numpy(rng.normal(size=1 << 20).astype(np.float32)) for i in range(16)}
    tiled, plain = Tiled(size=65536), Seeds(size=65536)

    def replay(basis: Any, some: dict[str, torch.Tensor]) -> None:
        coords = basis.coordinates(update)
        for name, weight in some.items():
            basis.add(weight, name, [(3, coords)])

    def once() -> None:
        SeedSum().combine([update] * 4, np.full(4, 0.25), {})

    few = number <= SEEDS[2]
    return {
        "tiled_s": timed(lambda: replay(tiled, weights), 5),
        "seeds_s": timed(lambda: replay(plain, {"w0": weights["w0"][: 1 << 18]}), 2) if few else 0.0,
        "sum_s": timed(once, 5),
        "bytes": len(SeedScalar().encode(update, WireContext(1, 7, {}, 65536), {})),
    }


def add(count: str) -> dict[str, float]:
    """Seconds and memory of a mean over so many int8 payloads of 4,096 coefficients, decoded as they arrive."""
    import torch

    from kilotune.aggregation.mean import Mean
    from kilotune.codec.coefficients import Coefficients
    from kilotune.core.types import TensorUpdate, WireContext

    codec, context, rng = Coefficients(), WireContext(1, 7, {"coords": (4096,)}), np.random.default_rng(0)
    drawn = [torch.from_numpy(rng.normal(size=4096).astype(np.float32)) for _ in range(100)]
    payloads = [codec.encode(TensorUpdate({"coords": x}), context, {}) for x in drawn]

    def mean() -> None:
        gathering = Mean().gather()
        for n in range(int(count)):
            gathering.add(codec.decode(payloads[n % 100], context), 1 + n % 7)
        gathering.result({})

    return {"seconds": timed(mean, 3), "bytes": peak()}


def simulate(folder: str, count: str) -> dict[str, float]:
    """Two rounds of ten clients out of so many."""
    import federation

    return federation.simulate(folder, count, "10", "2")


WORKERS: dict[str, Callable[..., dict[str, float]]] = {"step": step, "pairs": pairs, "add": add, "simulate": simulate}


def llama(size: str) -> Any:
    """A Llama whose weights are a tile of small random numbers: no time or memory depends on their values."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    hidden, layers = SIZES[size]
    with no_init_weights():
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=hidden,
                intermediate_size=hidden * 8 // 3,
                num_hidden_layers=layers,
                num_attention_heads=hidden // 32,
                max_position_embeddings=2048,
                tie_word_embeddings=True,
            )
        )
    tile = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32) * np.float32(0.02)
    for param in model.parameters():
        param.data = torch.from_numpy(np.resize(tile, tuple(param.shape)))
    return model.eval().requires_grad_(False)


def random_rows(rows: int, length: int) -> list[Any]:
    """Examples of different tokens, half of each an answer."""
    from kilotune.engine.rows.tokenize import Example

    made = []
    for index in range(rows):
        ids = np.random.default_rng(index).integers(3, VOCABULARY, length).astype(np.int32)
        labels = np.where(np.arange(length) < length // 2, -100, ids).astype(np.int32)
        made.append(Example(ids, labels, length // 2, "", None, index))
    return made


def import_all() -> None:
    """What is imported or compiled at first use must not count as memory of the model."""
    import torch

    from kilotune.basis.tiled import Tiled

    basis, few = Tiled(size=256), torch.ones(1000)
    basis.add(few, "w", [(1, torch.ones(256))])
    basis.project(few, "w", 1)
    llama("1M")(torch.ones(1, 8, dtype=torch.long))


def timed(call: Callable[[], object], tries: int, warm: bool = True) -> float:
    """Seconds of the fastest call, as what others do to a shared machine is no part of a curve; `warm`: after one
    untimed call."""
    if warm:
        call()
    taken = []
    for _ in range(tries):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return min(taken)


def rss() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak() -> int:
    from kilotune.engine.memory import peak_rss

    return peak_rss()


# -- charts ---------------------------------------------------------------------------------------------------------

STYLE = (
    "<style>text{font:12px sans-serif;fill:#444}.grid{stroke:#ddd}polyline{fill:none;stroke-width:2}"
    "polyline.c1{stroke:#1667b7}polyline.c2{stroke:#b0b0b0;stroke-dasharray:4 4}circle.c1{fill:#1667b7}"
    "circle.c2{fill:none}.middle{text-anchor:middle}.end{text-anchor:end}</style>"
)
SMALLEST = {"s": 1e-6, "bytes": 1.0}  # unit of the charts: microseconds and bytes, so that no logarithm is negative


def draw(folder: Path, curve: Curve) -> None:
    """Both axes as powers of ten; dashed, the promised slope through the last point."""
    from kilotune.engine.reporting._svg import Series, line_chart

    unit = SMALLEST[curve.unit]
    xs, ys = [math.log10(x) for x in curve.xs], [math.log10(max(y / unit, 1.0)) for y in curve.ys]
    promised = [(x, max(0.0, ys[-1] + curve.promised * (x - xs[-1]))) for x in xs]
    name = "microseconds" if curve.unit == "s" else "bytes"
    lines = [Series(f"{name}, 10^", list(zip(xs, ys, strict=True)), "c1"), Series("promised", promised, "c2")]
    text = line_chart(curve.what, lines, f"10^x of {curve.what.rpartition(' by ')[2]}", lambda v: f"{v:.1f}")
    text = text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f">{STYLE}", 1)
    (folder / f"{re.sub(r'[^a-z0-9]+', '-', curve.what.lower())}.svg").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
