"""The demo: a server and three clients, four processes over TLS on loopback, tune one real model together.

    python benchmarks/demo.py --output runs/demo

Each client holds the rows of one household and nothing else; a few kilobytes per round leave it. Prints base against
federated model on held-out rows, and leaves summary.json, report.html and final.seed in the output folder.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

from processes import enrol, federate

SETTINGS = [
    "data.system=",
    "batch_size=8",
    "local_steps=3",
    "evaluation.limit=16",
    "evaluation.max_new_tokens=40",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--households", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="resume the folder instead of starting anew")
    args = parser.parse_args()
    if not args.keep:
        shutil.rmtree(args.output, ignore_errors=True)
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    rows, names = household_rows(args.output / "households.jsonl", args.households)
    prepare_base()
    print(f"{len(names)} households, {rows} rows; each client process sees only its own", flush=True)
    keys = args.output / "keys"
    enrol(keys, names)
    settings = [f"rounds={args.rounds}", *SETTINGS]
    summary = federate(keys, args.output / "households.jsonl", names, settings, args.output, args.output / "clients")
    seconds = time.monotonic() - started
    report(summary, args.output, seconds)


def household_rows(path: Path, count: int) -> tuple[int, list[str]]:
    """Write the embedded data of some households to a file; returns rows and names."""
    from kilotune.engine.rows.households import generate

    rows = generate(households=count)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows), sorted({row["client"] for row in rows})


def prepare_base() -> None:
    """Convert the embedded model once, before three processes want it at the same time."""
    from kilotune.engine.model.base import load_base

    load_base("smollm2-135m", writable=False)


def report(summary: dict, output: Path, seconds: float) -> None:
    """The numbers a newcomer asks for."""
    before, after = summary["eval"]["before"], summary["eval"]["after"]
    rounds = summary["rounds"]
    print(f"\n                    base   federated   ({after['num_examples']} held-out rows, all households)")
    print(f"loss            {before['loss']:8.3f}  {after['loss']:10.3f}")
    print(f"exact match     {before['exact_match']:8.1%}  {after['exact_match']:10.1%}")
    print(f"ROUGE-L         {before['rouge_l']:8.1%}  {after['rouge_l']:10.1%}")
    up, down = summary["payload_up_bytes_per_client_round"], summary["payload_down_bytes_per_client_round"]
    socket_bytes = summary["socket"].values()
    per = len(summary["socket"]) * rounds
    print(f"\nper client and round, {rounds} rounds:")
    print(f"  payload       {up / 1000:6.2f} kB up  {down / 1000:6.2f} kB down")
    print(
        f"  socket        {sum(s['up_bytes'] for s in socket_bytes) / per / 1000:6.2f} kB up  "
        f"{sum(s['down_bytes'] for s in socket_bytes) / per / 1000:6.2f} kB down (TLS and HTTP included)"
    )
    print(f"peak memory of a process: {summary['peak_rss_bytes'] / 2**30:.2f} GiB;  {seconds:.0f} s in all")
    print(f"results in {output}: report.html, summary.json, final.seed ({summary['outputs']['seed_file_bytes']} bytes)")


if __name__ == "__main__":
    main()
