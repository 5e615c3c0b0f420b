"""Federation: what a round costs beyond the clients' own steps, and what ten thousand clients cost the server.

    python benchmarks/federation.py --output runs/bench/federation

Every run is a process of its own, so that its peak memory is its own. The tiny model (2 layers, width 32) makes the
steps nearly free, so that what is left is the federation; the last two rows are SmolLM2-135M.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import PATIENCE_S, Measurement, alone, write_measurements
from processes import enrol, federate

WORDS = ("on", "off", "up", "down", "hot", "cold", "red", "blue")
ROWS = 4  # per client
VECTORS = 10_000
TINY = ["data.max_length=64", "data.system=", "batch_size=2", "local_steps=1"]
TINY += ["evaluation.generate=false", "evaluation.limit=8", "threads=1"]
REAL = ["base=smollm2-135m", "data.max_length=64", "batch_size=2", "local_steps=1"]
REAL += ["evaluation.generate=false", "evaluation.limit=4"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/federation"))
    parser.add_argument("--only", nargs="*", help="parts to run; default: all", choices=PARTS)
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)  # this script calling itself
    args = parser.parse_args()
    if args.part:
        name, *words = args.part
        print(json.dumps(WORKERS[name](*words)))
        return
    rows: list[Measurement] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny(folder / "base")
        for part in args.only or PARTS:
            began, load = time.monotonic(), os.getloadavg()[0]
            rows += PARTS[part](folder, notes)
            print(f"{part}: {time.monotonic() - began:.0f} s, load average before {load:.1f}", flush=True)
    notes.append(f"Load average at the end: {os.getloadavg()[0]:.1f}.")
    write_measurements(args.output, "Federation", rows, notes)


# -- what is measured ---------------------------------------------------------------------------------------------


def simulated(folder: Path, notes: list[str]) -> list[Measurement]:
    """10 to 10,000 clients in one process."""
    found = {}
    for clients, per_round, rounds in ((10, 10, 20), (100, 100, 5), (1_000, 100, 5), (10_000, 100, 20)):
        found[clients] = alone(__file__, "simulate", folder, clients, per_round, rounds)
        notes.append(
            f"{clients:,} clients, {per_round} x {rounds} client-rounds: {found[clients]['wall_s']:.1f} s in all, "
            f"{found[clients]['overhead_ms']:.1f} ms beyond the {found[clients]['step_ms']:.1f} ms of a step, peak "
            f"{found[clients]['peak'] / 2**20:.0f} MiB."
        )
    most = found[10_000]
    ratio = most["peak"] / found[100]["peak"]
    spread = ", ".join(f"{n:,}: {f['overhead_ms']:.1f}" for n, f in found.items())
    return [
        Measurement(
            "simulated client: a round beyond its steps (ms)",
            f"{most['overhead_ms']:.1f} ms",
            "10,000 clients enrolled, 100 a round",
            most["overhead_ms"],
            20,
            "lower",
            f"by clients: {spread}",
            headline=True,
        ),
        Measurement(
            "memory, 10,000 clients enrolled",
            f"{most['peak'] / 2**20:.0f} MiB",
            f"100 clients: {found[100]['peak'] / 2**20:.0f} MiB",
            ratio,
            1.1,
            "lower",
            f"10: {found[10]['peak'] / 2**20:.0f}, 1,000: {found[1000]['peak'] / 2**20:.0f} MiB",
        ),
        Measurement(
            "10,000 clients x 20 rounds of 100: all but the steps (s)",
            f"{most['wall_s']:.0f} s in all",
            f"{most['wall_s'] - most['rest_s']:.0f} s are training steps",
            most["rest_s"],
            2_000 * 0.02,
            "lower",
            "loading, hello to all and report included",
        ),
    ]


def deployed(folder: Path, notes: list[str]) -> list[Measurement]:
    """A server and three clients, real processes over TLS on loopback."""
    rows = []
    for label, settings, rounds, target in (
        ("tiny model", [f"base={folder / 'base'}", *TINY], 12, 0.5),
        ("SmolLM2-135M", REAL, 5, 0.5),
    ):
        spent = deploy(folder / label.split("-")[0].replace(" ", "_"), settings, rounds)
        beyond = [total - slowest for total, slowest in spent]
        rows.append(
            Measurement(
                f"3 processes, {label}: a round beyond the slowest client (s)",
                f"{statistics.median(beyond):.3f} s",
                f"the client computes {statistics.median(s for _, s in spent):.2f} s",
                statistics.median(beyond),
                target,
                "lower",
                f"{rounds} rounds, {min(beyond):.3f}-{max(beyond):.3f} s",
                headline=label != "tiny model",
            )
        )
    return rows


def aggregation(folder: Path, notes: list[str]) -> list[Measurement]:
    """Decode and mean of 10,000 payloads of the default recipe."""
    found = alone(__file__, "aggregate")
    notes.append(
        f"Aggregation: decode {found['decode_us']:.0f} µs and addition {found['add_us']:.0f} µs a vector; the sums "
        f"take {found['sum_bytes'] / 1024:.0f} KiB whatever the number of vectors. The plain way holds "
        f"{VECTORS * found['numbers'] * 4 / 2**20:.0f} MiB of float32."
    )
    return [
        Measurement(
            f"aggregation of {VECTORS:,} payloads of {found['numbers']:,} (s)",
            f"{found['median_s']:.2f} s",
            f"decode all, then numpy's average: {found['plain_s']:.2f} s",
            found["median_s"],
            1.0,
            "lower",
            f"5 runs, {found['low_s']:.2f}-{found['high_s']:.2f} s",
        )
    ]


def real_crowd(folder: Path, notes: list[str]) -> list[Measurement]:
    """200 clients that share one resident SmolLM2-135M."""
    found = alone(__file__, "crowd", folder)
    beyond = (found["peak"] - found["base_bytes"]) / 1e9
    return [
        Measurement(
            "200 clients on SmolLM2: memory beyond the base (GB)",
            f"{found['peak'] / 1e9:.2f} GB peak",
            f"base weights {found['base_bytes'] / 1e9:.2f} GB",
            beyond,
            1.5,
            "lower",
            f"1 round of 20 clients, {found['wall_s']:.0f} s",
        )
    ]


PARTS = {"simulated": simulated, "deployed": deployed, "aggregation": aggregation, "real_crowd": real_crowd}


# -- processes of their own -----------------------------------------------------------------------------------------


def simulate(folder: str, clients: str, per_round: str, rounds: str) -> dict[str, float]:
    """Wall time, time inside the training steps, and peak memory of one simulated run."""
    from kilotune.engine.rounds.worker import Worker

    steps, spent = Worker._steps, []

    def timed(self: Worker, *args: Any) -> Any:
        started = time.perf_counter()
        try:
            return steps(self, *args)
        finally:
            spent.append(time.perf_counter() - started)

    Worker._steps = timed  # type: ignore[method-assign]
    here = Path(folder)
    data = write_rows(here / f"rows-{clients}.jsonl", int(clients))
    settings = [f"base={here / 'base'}", f"data.path={data}", f"rounds={rounds}", *TINY]
    settings += [f"schedule={{name: uniform, clients_per_round: {per_round}}}"]
    found = federated(settings, here / f"run-{clients}")
    inside = sum(spent)
    return {
        "wall_s": found["wall_s"],
        "rest_s": found["wall_s"] - inside,
        "overhead_ms": (found["rounds_s"] - inside) / len(spent) * 1e3,
        "step_ms": inside / len(spent) * 1e3,
        "peak": found["peak"],
    }


def crowd(folder: str) -> dict[str, float]:
    """Peak memory of one round of 20 out of 200 clients on the real model."""
    data = write_rows(Path(folder) / "rows-200.jsonl", 200)
    settings = [*REAL, f"data.path={data}", "rounds=1", "schedule={name: uniform, clients_per_round: 20}"]
    return federated(settings, Path(folder) / "crowd")


def federated(settings: list[str], output: Path) -> dict[str, float]:
    from kilotune.engine.composing.compose import compose
    from kilotune.engine.memory import peak_rss
    from kilotune.engine.model.base import load_base
    from kilotune.engine.session import federate

    plan, started, rounds = compose("kilotune", "federate", settings), time.perf_counter(), []
    federate(plan, output, lambda event: rounds.append(event["seconds"]) if event["event"] == "round" else None)
    wall, peak = time.perf_counter() - started, peak_rss()
    base_bytes = sum(p.numel() * 4 for p in load_base(plan.recipe.base).parameters().values())
    return {"wall_s": wall, "rounds_s": sum(rounds), "peak": peak, "base_bytes": base_bytes}


def aggregate() -> dict[str, float]:
    """Seconds for all vectors: as they arrive, and the plain way."""
    import numpy as np
    import torch

    from kilotune.aggregation.mean import Mean
    from kilotune.core.types import TensorUpdate, WireContext
    from kilotune.engine.composing.compose import compose

    plan, rng = compose("kilotune", "federate"), np.random.default_rng(0)
    assert plan.basis is not None
    codec, size = plan.uplink, plan.basis.size
    context = WireContext(1, 7, {"coords": (size,)}, size)
    drawn = [rng.normal(size=size).astype(np.float32) * rng.uniform(0.1, 10) for _ in range(500)]
    made = [codec.encode(TensorUpdate({"coords": torch.from_numpy(x)}), context, {}) for x in drawn]
    payloads = [made[i % len(made)] for i in range(VECTORS)]
    counts = [1 + i % 50 for i in range(VECTORS)]

    def streaming(part: int) -> tuple[float, Any]:
        gathering, started = Mean().gather(), time.perf_counter()
        for payload, count in zip(payloads[:part], counts, strict=False):
            gathering.add(codec.decode(payload, context), count)
        gathering.result({})
        return time.perf_counter() - started, gathering

    def plain() -> float:
        started = time.perf_counter()
        table = np.stack([codec.decode(payload, context).tensors["coords"].numpy() for payload in payloads])
        np.average(table, axis=0, weights=counts)
        return time.perf_counter() - started

    streaming(100)
    runs, plainly = [], []
    for _ in range(5):
        seconds, gathering = streaming(VECTORS)
        runs.append(seconds)
        plainly.append(plain())
    started = time.perf_counter()
    for payload in payloads:
        codec.decode(payload, context)
    decode = time.perf_counter() - started
    (sums,) = gathering._sums.values()
    return {
        "numbers": size,
        "median_s": statistics.median(runs),
        "low_s": min(runs),
        "high_s": max(runs),
        "plain_s": statistics.median(plainly),
        "decode_us": decode / VECTORS * 1e6,
        "add_us": (statistics.median(runs) - decode) / VECTORS * 1e6,
        "sum_bytes": sum(level.nbytes for level in sums._levels),
    }


WORKERS = {"simulate": simulate, "crowd": crowd, "aggregate": aggregate}


def deploy(folder: Path, settings: list[str], rounds: int) -> list[tuple[float, float]]:
    """(seconds of a round at the server, seconds of its slowest client) of every round but the first."""
    folder.mkdir()
    data, names = write_rows(folder / "rows.jsonl", 3, rows=24), [f"c{n:05d}" for n in range(3)]
    keys = folder / "keys"
    enrol(keys, names, quiet=True)
    sets = [*settings, f"rounds={rounds + 1}"]
    federate(keys, data, names, sets, folder / "server", folder / "clients", quiet=True, timeout_s=PATIENCE_S)
    slowest: dict[int, float] = {}
    spent = []
    for line in (folder / "server" / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] == "client" and event.get("status") == "ok":
            slowest[event["round"]] = max(slowest.get(event["round"], 0.0), event["seconds"])
        elif event["event"] == "round" and event["round"] > 1:  # the first one compiles and warms caches
            spent.append((event["seconds"], slowest[event["round"]]))
    return spent


# -- a tiny model and its rows --------------------------------------------------------------------------------------


def save_tiny(folder: Path) -> None:
    """A Llama of 2 layers and width 32 over single bytes, with random weights."""
    import torch
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[2], pad_token=special[0])
    fast.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    fast.save_pretrained(str(folder))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, eos_token_id=2, pad_token_id=0)).save_pretrained(str(folder))


def write_rows(path: Path, clients: int, rows: int = ROWS) -> Path:
    """One JSON Lines file for all clients; the first eight have a held-out row each."""
    with open(path, "w", encoding="utf-8") as file:
        for client in range(clients):
            for n in range(rows):
                row = {
                    "client": f"c{client:05d}",
                    "instruction": f"{client} {WORDS[n % 8]} {n}",
                    "output": WORDS[(n + client) % 8],
                    "split": "test" if n == rows - 1 and client < 8 else "train",
                }
                file.write(json.dumps(row) + "\n")
    return path


if __name__ == "__main__":
    main()
