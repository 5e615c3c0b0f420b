"""Replay at memory speed: any number of directions and steps against a plain copy of the same weights, 2 threads.

    python benchmarks/replay.py --output runs/bench/replay

The shapes are SmolLM2-135M's (134.5M weights); the numbers in them are random, since no time depends on them. The
published loops (MeZO, FedKSeed) are written here plainly: per direction and tensor, seed a generator, draw, add.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import kilotune  # noqa: F401 - before torch, so that its threads wait as in a run

# isort: split
import numpy as np
import torch
from torch import Tensor

from common import Measurement, paired_seconds, write_measurements
from kilotune.basis import Int8
from kilotune.basis.seeds import Seeds
from kilotune.basis.tiled import Tiled
from kilotune.core import _loops, kernels
from kilotune.core._spec import CHUNK
from kilotune.core.types import SeedUpdate

DIRECTIONS = 4096
ROUNDS = 20
PART = 1 << 22  # bytes a thread copies at once
POOL = ThreadPoolExecutor(2)
Weights = dict[str, Tensor]
Rows = list[Measurement]


def shapes() -> dict[str, tuple[int, ...]]:
    """SmolLM2-135M: 30 layers, tied embeddings."""
    hidden, middle, vocabulary = 576, 1536, 49152
    of_layer = {
        "input_layernorm": (hidden,),
        "mlp.down_proj": (hidden, middle),
        "mlp.gate_proj": (middle, hidden),
        "mlp.up_proj": (middle, hidden),
        "post_attention_layernorm": (hidden,),
        "self_attn.k_proj": (hidden // 3, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (hidden // 3, hidden),
    }
    layers = {f"model.layers.{n}.{name}.weight": shape for n in range(30) for name, shape in of_layer.items()}
    return {"model.embed_tokens.weight": (vocabulary, hidden), **layers, "model.norm.weight": (hidden,)}


def filled(names: dict[str, tuple[int, ...]]) -> Weights:
    some = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32) * np.float32(0.02)
    return {name: torch.from_numpy(np.resize(some, shape)) for name, shape in names.items()}


def like(weights: Weights, dtype: torch.dtype | None = None) -> Weights:
    return {name: torch.zeros_like(value, dtype=dtype) for name, value in weights.items()}


def copy(source: Weights, out: Weights) -> None:
    """The yardstick: memcpy in two threads, each weight read once and written once."""
    jobs = [(source[name].view(-1).view(torch.uint8), out[name].view(-1).view(torch.uint8)) for name in source]
    parts = [(x[at : at + PART], y[at : at + PART]) for x, y in jobs for at in range(0, x.numel(), PART)]
    for _ in POOL.map(lambda part: np.copyto(part[1].numpy(), part[0].numpy()), parts):
        pass


def coordinates(count: int, seed: int = 0) -> Tensor:
    numbers = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
    return torch.from_numpy(numbers * np.float32(1e-6))


def compared(
    what: str,
    against: str,
    ours: Callable[[], object],
    baseline: Callable[[], object],
    target: float,
    gain: bool = False,
    pairs: int = 5,
) -> Measurement:
    """`gain`: how many times faster we are; otherwise how many times the baseline's time we take."""
    mine, theirs = paired_seconds(ours, baseline, pairs)
    a, b = statistics.median(mine), statistics.median(theirs)
    spread = f"{pairs} pairs, {min(mine):.3g}-{max(mine):.3g} s against {min(theirs):.3g}-{max(theirs):.3g} s"
    ratio = b / a if gain else a / b
    return Measurement(
        what, f"{a:.3g} s", f"{against}, {b:.3g} s", ratio, target, "higher" if gain else "lower", spread
    )


# -- tiled ------------------------------------------------------------------------------------------------------------


def tiled_rows(weights: Weights, out: Weights) -> Rows:
    """One Walsh-Hadamard transform and one pass, in place and into another buffer; many rounds in one walk."""
    basis, rng = Tiled(size=DIRECTIONS), np.random.default_rng(1)
    pairs = SeedUpdate(rng.permutation(DIRECTIONS), rng.standard_normal(DIRECTIONS).astype(np.float32) * 1e-7)
    rounds = [(root, coordinates(DIRECTIONS, root)) for root in range(ROUNDS)]

    def replay(target: Weights) -> None:
        moved = basis.coordinates(pairs)
        for name, value in weights.items():
            basis.add(value, name, [(7, moved)], out=target[name])

    def one_walk() -> None:
        for name, value in weights.items():
            basis.add(value, name, rounds)

    def round_by_round() -> None:
        for one in rounds:
            for name, value in weights.items():
                basis.add(value, name, [one])

    memcpy = lambda: copy(weights, out)  # noqa: E731
    seeds = f"tiled, {DIRECTIONS:,} seeds"
    walk = compared(
        f"tiled, {ROUNDS} rounds with fresh roots, one walk", "round by round", one_walk, round_by_round, 1.5, True, 3
    )
    alone = statistics.median(paired_seconds(memcpy, memcpy, 3)[0])
    a_round = float(walk.ours.split()[0]) / ROUNDS
    gradient = lambda: [basis.project(value, name, 7) for name, value in weights.items()]  # noqa: E731
    return [
        replace(compared(f"{seeds}, in place", "memcpy", lambda: replay(weights), memcpy, 3), headline=True),
        compared(f"{seeds}, into a second buffer", "memcpy", lambda: replay(out), memcpy, 3),
        walk,
        Measurement(
            "tiled, each of these rounds",
            f"{a_round:.3g} s",
            f"memcpy, {alone:.3g} s",
            a_round / alone,
            3,
            "lower",
            "from the walk above",
        ),
        compared("tiled, gradient onto 4,096 directions", "memcpy", gradient, memcpy, 3),
    ]


def regenerated_row(weights: Weights, ours_s: float, directions: int = 8) -> Measurement:
    """Replaying a seed list as published: every direction drawn anew, tensor by tensor, and added."""
    taken = []
    for seed in range(directions):
        started = time.perf_counter()
        published(weights, [seed], torch.tensor([1e-9]))
        taken.append(time.perf_counter() - started)
    whole = statistics.median(taken) * DIRECTIONS
    return Measurement(
        f"tiled, {DIRECTIONS:,} seeds, in place",
        f"{ours_s:.3g} s",
        f"{DIRECTIONS:,} Gaussian directions drawn again, {whole:.0f} s ({directions} timed)",
        whole / ours_s,
        1000,
        "higher",
        f"{directions} directions, {min(taken):.3g}-{max(taken):.3g} s each",
        headline=True,
    )


# -- seeds ------------------------------------------------------------------------------------------------------------


def published(weights: Weights, seeds: list[int], coefs: Tensor) -> None:
    """The loop of MeZO and FedKSeed: torch's generator, one pass over the weights a seed."""
    generator = torch.Generator()
    for seed, coef in zip(seeds, coefs.tolist(), strict=True):
        generator.manual_seed(seed)
        for value in weights.values():
            value.add_(torch.randn(value.shape, generator=generator), alpha=coef)


def plain_projection(gradients: Weights, seeds: list[int]) -> None:
    generator = torch.Generator()
    for seed in seeds:
        generator.manual_seed(seed)
        for value in gradients.values():
            torch.dot(torch.randn(value.numel(), generator=generator), value.view(-1))


def seeds_rows(weights: Weights, count: int = 64) -> Rows:
    """One decoder layer, since every cost is per weight and direction; the embedding where memory must count."""
    layer = {name: value for name, value in weights.items() if ".layers.7." in name}
    table = {name: value for name, value in weights.items() if "embed" in name}
    a, gaussian, sign = coordinates(count), Seeds(size=count), Seeds(size=count, law="sign")

    def block_wise(basis: Seeds, some: Weights) -> None:
        for name, value in some.items():
            basis.add(value, name, [(3, a)])

    def pass_a_seed(basis: Seeds, some: Weights) -> None:
        for k in range(count):
            one = basis.direction(k) * a
            for name, value in some.items():
                basis.add(value, name, [(3, one)])

    def project() -> None:
        for name, value in layer.items():
            gaussian.project(value, name, 3)

    loop = lambda: published(layer, list(range(count)), a)  # noqa: E731
    dots = lambda: plain_projection(layer, list(range(count)))  # noqa: E731
    k = f"K = {count}"
    return [
        compared(f"seeds gaussian, {k}", "published loop", lambda: block_wise(gaussian, layer), loop, 1.5, True, 2),
        compared(f"seeds gaussian, projection, {k}", "published loop", project, dots, 1.5, True, 2),
        compared(f"seeds sign, {k}", "published loop", lambda: block_wise(sign, layer), loop, 20, True, 1),
        compared(
            f"seeds gaussian, {k}",
            "same noise, a pass a seed",
            lambda: block_wise(gaussian, layer),
            lambda: pass_a_seed(gaussian, layer),
            1,
            True,
            2,
        ),
        compared(
            f"seeds sign, {k}, embedding",
            "same noise, a pass a seed",
            lambda: block_wise(sign, table),
            lambda: pass_a_seed(sign, table),
            2,
            True,
            3,
        ),
        one_pool_row(layer),
    ]


def one_pool_row(layer: Weights, count: int = 8) -> Measurement:
    """FedKSeed keeps one pool for the run: a newcomer makes its noise once for all rounds."""
    basis, steps = Seeds(size=count), [(3, coordinates(count, n)) for n in range(ROUNDS)]

    def one_walk() -> None:
        for name, value in layer.items():
            basis.add(value, name, steps)

    def round_by_round() -> None:
        for step in steps:
            for name, value in layer.items():
                basis.add(value, name, [step])

    what = f"seeds gaussian, one layer, K = {count}, {ROUNDS} rounds over one pool"
    return compared(what, "round by round", one_walk, round_by_round, 5, True, 3)


# -- stored weights ---------------------------------------------------------------------------------------------------


def stored_rows(weights: Weights, out: Weights) -> Rows:
    """Bases in fewer bytes, widened and moved in one pass; against a copy of the stored bytes and against torch."""
    basis, u, rows = Tiled(size=DIRECTIONS), coordinates(DIRECTIONS), []
    for kind, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("int8", torch.int8)):
        scale = 1000 if dtype == torch.int8 else 1
        base = {name: (value * scale).clamp(-127, 127).to(dtype) for name, value in weights.items()}
        scales = {name: torch.full((value.shape[0],), 1e-3) for name, value in weights.items()}
        twin = like(base)

        def fill(base: Weights = base, scales: Weights = scales) -> None:
            for name, value in base.items():
                source = Int8(value, scales[name]) if value.dtype == torch.int8 else value
                basis.add(source, name, [(5, u)], out=out[name])

        def widen(base: Weights = base, scales: Weights = scales) -> None:
            for name, value in base.items():
                out[name].copy_(value)
                if value.dtype == torch.int8:
                    out[name].view(value.shape[0], -1).mul_(scales[name][:, None])

        rows.append(compared(f"{kind} base to fp32, tiled", f"memcpy of {kind}", fill, lambda: copy(base, twin), 3))  # noqa: B023
        rows.append(compared(f"{kind} base to fp32, tiled", "torch, widened and not moved", fill, widen, 3))
        if dtype == torch.float16:
            continue
        halves = like(base, torch.bfloat16)

        def narrow(base: Weights = base, scales: Weights = scales, halves: Weights = halves) -> None:
            for name, value in base.items():
                source = Int8(value, scales[name]) if value.dtype == torch.int8 else value
                basis.add(source, name, [(5, u)], out=halves[name])

        rows.append(compared(f"{kind} base to bf16, tiled", f"memcpy of {kind}", narrow, lambda: copy(base, twin), 3))  # noqa: B023
    return rows


def profile(repeats: int = 50) -> str:
    """Where the time of a stored base goes: its steps on one chunk in cache, CPU time of one thread."""
    x, bits, none = np.zeros(CHUNK, np.float32), np.zeros(CHUNK, np.uint16), np.empty(0, np.float32)
    key, u = np.ones((1, 2), np.uint64), np.ones((1, 1, DIRECTIONS), np.float32)
    bf16, fp16 = kernels.Stored(bits), kernels.Stored(np.zeros(CHUNK, np.float16))
    int8 = kernels.Stored(np.zeros(CHUNK, np.int8), np.ones(64, np.float32))
    steps = {
        "widening bf16": lambda: bf16.load(0, x),
        "widening fp16": lambda: fp16.load(0, x),
        "widening int8": lambda: int8.load(0, x),
        "adding signs": lambda: _loops.tiled_add(none, x, x, key, u, 0, 0, 1),
        "rounding to bf16": lambda: _loops.store_bf16(x, bits),
    }
    taken = []
    for what, step in steps.items():
        step()
        started = time.thread_time()
        for _ in range(repeats):
            step()
        taken.append(f"{what} {(time.thread_time() - started) / repeats / CHUNK * 1e9:.2f}")
    return f"In cache, ns a weight and thread: {', '.join(taken)}."


def mapped_row(weights: Weights) -> Measurement:
    """A tuned model from a base that stays a read-only file: straight into new memory, or copied and then changed."""
    basis, u = Tiled(size=DIRECTIONS), coordinates(DIRECTIONS)
    with tempfile.NamedTemporaryFile(suffix=".weights") as file:
        for value in weights.values():
            value.numpy().tofile(file)
        file.flush()
        pages, at = torch.from_file(file.name, shared=False, size=sum(v.numel() for v in weights.values())), 0
        base = {}
        for name, value in weights.items():
            base[name], at = pages[at : at + value.numel()].view(value.shape), at + value.numel()

        def straight() -> Weights:
            return {n: basis.add(value, n, [(5, u)], out=torch.empty_like(value)) for n, value in base.items()}

        def copied() -> Weights:
            return {n: basis.add(value.clone(), n, [(5, u)]) for n, value in base.items()}

        return compared("mapped base to new memory, tiled", "clone, then add in place", straight, copied, 1, pairs=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/replay"))
    args = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    load = os.getloadavg()[0]
    weights = filled(shapes())
    out = like(weights)
    rows = tiled_rows(weights, out)
    rows.insert(0, regenerated_row(weights, float(rows[0].ours.split()[0])))
    rows += seeds_rows(weights)
    rows += stored_rows(weights, out)
    del out
    rows.append(mapped_row(weights))
    count = sum(value.numel() for value in weights.values())
    notes = [
        f"{count:,} weights, {torch.get_num_threads()} threads, load average {load:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after. memcpy is NumPy's copyto in two threads, 4 MiB at a time.",
        "Ratios with target ≤ are time over the baseline's, those with target ≥ are the baseline's time over ours.",
        "Where narrow bases miss: memcpy moves 2 bytes a weight of int8 and 4 of bf16 or fp16, results in fp32 5 and 6 "
        "(9 and 10 with the cache lines that are read before they are written), and the arithmetic costs the same for "
        f"every type: widening, signs and rounding are added to the time of the memory, not hidden in it. {profile()}",
    ]
    write_measurements(args.output, "Replay", rows, notes)


if __name__ == "__main__":
    main()
