"""First-order steps: our training step beside the Transformers Trainer and TRL's SFTTrainer, on the same rows.

    python benchmarks/first_order.py --data DIR --output runs/bench/first_order

Every run is a process of its own: the embedded model in float32, the same rows in the same order, the same optimizer
(AdamW, no clipping, constant rate), LoRA r = 8 on all linear layers or all weights. The first step is a warm-up. Speed
is labelled tokens per second of the remaining steps, memory the peak resident size of the process. `--peers` is a
Python with transformers, peft and trl (`make bench` makes one); ours runs in this one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Measurement, write_measurements

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
RATES = {"lora": 1e-3, "full": 2e-5}
PEERS = {"trainer": "Transformers Trainer", "sft": "TRL SFTTrainer"}
THREADS = 2
SPEED, MEMORY, SAME_LOSS = 1.5, 0.6, 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with clinc150.jsonl.gz and dolly.jsonl.gz")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/first_order"))
    parser.add_argument("--peers", default=sys.executable, help="Python of the peers' environment")
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one for warming up")
    parser.add_argument("--only", nargs="*", help="e.g. clinc150 lora")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        print(json.dumps(our_steps(json.loads(args.ours.read_text(encoding="utf-8")))))
        return
    rows: list[Measurement] = []
    notes = [f"{args.steps} measured steps, {THREADS} threads; peers: float32, no activation checkpointing."]
    for data, batch_size in (("clinc150", 8), ("dolly", 4)):
        examples, model = encoded(args.data / f"{data}.jsonl.gz", batch_size * (args.steps + 1))
        for method in ("lora", "full"):
            if args.only and not {data, method} >= set(args.only):
                continue
            found, remark = compare(data, method, batch_size, examples, model, args.peers)
            rows += found
            notes.append(remark)
    write_measurements(args.output, "First-order steps", rows, notes)


def encoded(path: Path, count: int) -> tuple[list[dict[str, list[int]]], str]:
    """`count` training rows as tokens and labels, drawn over all clients, and the folder of the model."""
    from kilotune.core.rng import stream
    from kilotune.engine.composing.compose import build, override, read
    from kilotune.engine.model.base import load_base
    from kilotune.engine.model.sources import find_folder
    from kilotune.engine.session import encode_rows, split_rows

    plan = build(override(read("local_lora"), [f"data.path={path}"]), "tune")
    (members,) = split_rows(plan, alone=True).clients.values()
    chosen = [members[i] for i in sorted(stream(0, "rows").permutation(len(members))[:count].tolist())]
    order = stream(0, "order").permutation(count).tolist()
    base = load_base("smollm2-135m")
    examples = encode_rows(plan, base, [chosen[i] for i in order], "rows", lambda event: None)
    tokens = [{"input_ids": e.input_ids.tolist(), "labels": e.labels.tolist()} for e in examples]
    return tokens, str(find_folder("smollm2-135m", None, None, None))


def compare(
    data: str, method: str, batch_size: int, examples: list[dict[str, list[int]]], model: str, peers: str
) -> tuple[list[Measurement], str]:
    """Ours against each peer for one task and method, and how far the losses are apart."""
    job = {"model": model, "rows": examples, "batch_size": batch_size, "method": method, "threads": THREADS}
    job |= {"lr": RATES[method], "lora": LORA}
    labels = [
        sum(sum(label != -100 for label in row["labels"][1:]) for row in examples[i : i + batch_size])
        for i in range(0, len(examples), batch_size)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job | {"output": folder}), encoding="utf-8")
        here = Path(__file__).parent
        ours = run([sys.executable, str(here / "first_order.py"), "--ours", str(path)])
        theirs = {peer: run([peers, str(here / "peers.py"), peer, str(path)]) for peer in PEERS}
    rows = []
    speed = sum(labels[1:]) / sum(ours["seconds"][1:])
    what = f"{data}, batch {batch_size}, {'LoRA r=8' if method == 'lora' else 'all weights'}"
    for peer, result in theirs.items():
        other = sum(labels[1:]) / sum(result["seconds"][1:])
        spread = f"steps {low_high(ours['seconds'][1:])} against {low_high(result['seconds'][1:])} s"
        rows.append(
            Measurement(
                f"{what}: labelled tokens/s",
                f"{speed:.1f}",
                f"{PEERS[peer]} {other:.1f}",
                speed / other,
                SPEED,
                "higher",
                spread,
                headline=peer == "trainer",
            )
        )
        mine, its = ours["peak_rss_bytes"], result["peak_rss_bytes"]
        rows.append(
            Measurement(
                f"{what}: peak memory",
                f"{mine / 1e9:.2f} GB",
                f"{PEERS[peer]} {its / 1e9:.2f} GB",
                mine / its,
                MEMORY,
                "lower",
                headline=peer == "trainer",
            )
        )
    pairs = zip(ours["losses"], theirs["trainer"]["losses"], strict=True)
    apart = max(abs(a - b) for a, b in pairs)
    remark = f"{what}: losses {', '.join(f'{v:.4f}' for v in ours['losses'])}; at most {apart:.4f} from the Trainer's."
    return rows, remark


def low_high(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def run(words: list[str]) -> dict[str, Any]:
    """The JSON a process prints last."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    content: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(" ".join(words[1:4]), {k: v for k, v in content.items() if k != "rows"}, file=sys.stderr, flush=True)
    return content


def our_steps(job: dict[str, Any]) -> dict[str, Any]:
    """kilotune's own step on the rows of a job."""
    import numpy as np

    from kilotune.core.rng import stream
    from kilotune.engine.composing.compose import build, override, read
    from kilotune.engine.memory import peak_rss
    from kilotune.engine.model.compute import Compute
    from kilotune.engine.rounds.replica import Replica
    from kilotune.engine.rows.batches import micro_batches
    from kilotune.engine.rows.tokenize import Example
    from kilotune.engine.session import open_base
    from kilotune.engine.training.step import BatchObjective, Memory, train_step

    changes = [f"optimizer.lr={job['lr']}", f"threads={job['threads']}"]
    plan = build(override(read(f"local_{job['method']}"), changes), "tune")
    replica = Replica(open_base(plan, lambda event: None), plan)
    examples = [
        Example(np.array(row["input_ids"], np.int32), np.array(row["labels"], np.int32), 0, "", None, i)
        for i, row in enumerate(job["rows"])
    ]
    memory, seconds, losses = Memory.empty(), [], []
    for start in range(0, len(examples), job["batch_size"]):
        started = time.perf_counter()
        rows = examples[start : start + job["batch_size"]]
        batches = micro_batches(rows, plan.recipe, replica.model, 0)
        objective = BatchObjective(replica.model, batches, Compute.of(plan.recipe))
        report = train_step(
            replica.trainable, plan.estimator, plan.optimizer, objective, memory, 1.0, stream(0, "step", start)
        )
        seconds.append(time.perf_counter() - started)
        losses.append(report.loss)
    return {"seconds": seconds, "losses": losses, "peak_rss_bytes": peak_rss()}


if __name__ == "__main__":
    main()
