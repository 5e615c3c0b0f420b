"""Protocols: seven recipes with the same rows, clients, rounds and local steps; quality, bytes, memory, time.

    python benchmarks/protocols.py --data clinc150.jsonl.gz --output runs/protocols

Clients are the values of the rows' `client` field (the first `--clients` of them). Everything a recipe fixes itself
(basis, estimator, optimizer, codecs, learning rate) stays as shipped. `--tuned` adds FedKSeed with a rate
measured for this model, because published rates belong to larger ones.
"""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

from common import figure, run_recipe, write_table

RECIPES = ("kilotune", "kilotune_zeroth", "mixed", "fedavg_lora", "fedkseed", "fedkseed_pro", "ferret")
# The published rate moves a 135M model hardly at all in a few dozen steps; this row shows the protocol at a better one.
TUNED = {
    "fedkseed, measured rate": ("fedkseed", ["optimizer.lr=auto", "estimator.clip=3"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSON Lines with `client` and `split`")
    parser.add_argument("--output", type=Path, default=Path("runs/protocols"))
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--local-steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--limit", type=int, default=40, help="held-out rows, spread evenly over the clients")
    parser.add_argument("--tuned", action="store_true", help="also run the rows with a rate found for this model")
    parser.add_argument("--only", nargs="*", help="recipes to run; default: all")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    data = first_clients(args.data, args.clients, args.output / "rows.jsonl")
    shared = [f"data.path={data}", "data.system=", f"rounds={args.rounds}", f"evaluation.limit={args.limit}"]
    shared += [f"local_steps={args.local_steps}", f"batch_size={args.batch_size}", "evaluation.max_new_tokens=12"]
    jobs = {name: (name, []) for name in RECIPES} | (TUNED if args.tuned else {})
    results: dict[str, dict[str, Any]] = {}
    for label, (recipe, changes) in jobs.items():
        if args.only and recipe not in args.only:
            continue
        extra = ["clients=" + json.dumps(same_steps(args.local_steps))] if recipe == "mixed" else []
        folder = args.output / label.replace(", ", "-").replace(" ", "_")
        results[label] = run_recipe(recipe, [*shared, *extra, *changes], folder)
        print(figure(label, results[label]), flush=True)
    table(args.output / "protocols", results)


def first_clients(path: Path, count: int, target: Path) -> Path:
    """The rows of the first clients, so that every protocol sees the same."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    chosen = sorted({row["client"] for row in rows})[:count]
    target.write_text("".join(json.dumps(r) + "\n" for r in rows if r["client"] in chosen), encoding="utf-8")
    return target


def same_steps(local_steps: int) -> list[dict[str, Any]]:
    """The forward-only group of `mixed` with as many steps as everybody else here."""
    from kilotune.engine.compose import read

    return [{**group, "local_steps": local_steps} for group in read("mixed")["clients"]]


def table(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """One row per protocol, base first."""
    base = next(iter(results.values()))["eval"]["before"]
    rows = [["base", f"{base['loss']:.3f}", f"{base['exact_match']:.1%}", "", "", "", ""]]
    for label, summary in results.items():
        after = summary["eval"]["after"]
        up, down = (summary[f"payload_{way}_bytes_per_client_round"] for way in ("up", "down"))
        quality = [label, f"{after['loss']:.3f}", f"{after['exact_match']:.1%}"]
        cost = [f"{up:,.0f}", f"{down:,.0f}", f"{summary['peak_rss_bytes'] / 2**30:.2f}", f"{summary['seconds']:.0f}"]
        rows.append([*quality, *cost])
    columns = ["protocol", "loss", "exact match", "up (B)", "down (B)", "peak memory (GiB)", "seconds"]
    notes = ["Bytes are payload per client and round. All clients in one process, one after the other."]
    write_table(path, "Protocols", columns, rows, notes)


if __name__ == "__main__":
    main()
