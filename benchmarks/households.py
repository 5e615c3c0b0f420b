"""Households: federated against each household alone and against centralised LoRA, under the same local compute.

    python benchmarks/households.py --output runs/households

All runs start from the same base and are measured on the union of all households' held-out rows. "Same local compute":
a household makes rounds x local steps optimizer steps of the same batch size, alone or in the federation; centralised
LoRA makes as many steps with the rows of all households in each. A finished run in the output folder is not repeated.
"""

import argparse
from pathlib import Path
from typing import Any

from common import figure, run_recipe, write_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/households"))
    parser.add_argument("--households", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--local-steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--limit", type=int, default=60, help="held-out rows, spread evenly over the households")
    args = parser.parse_args()
    from kilotune.engine.rows.households import names

    shared = [f"data.path=households:{args.households}", "data.system=", f"evaluation.limit={args.limit}"]
    steps = args.rounds * args.local_steps
    rounds = [f"rounds={args.rounds}", f"local_steps={args.local_steps}", f"batch_size={args.batch_size}"]
    alone = [*shared, f"steps={steps}", f"batch_size={args.batch_size}"]
    union = [*shared, f"steps={steps}", f"batch_size={args.batch_size * args.households}"]
    jobs = {
        "federated, kilotune": ("kilotune", [*shared, *rounds]),
        "centralised, LoRA": ("local_lora", union),
    }
    for name in names()[: args.households]:
        jobs[f"{name} alone, LoRA"] = ("local_lora", [*alone, f"data.only={name}"])
    results: dict[str, dict[str, Any]] = {}
    for label, (recipe, overrides) in jobs.items():
        results[label] = run_recipe(recipe, overrides, args.output / label.replace(", ", "-").replace(" ", "_"))
        print(figure(label, results[label]), flush=True)
    table(args.output / "households", results)


def table(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Base first, then every run; and how much of the gap the federation closes."""
    ours, best = results["federated, kilotune"], results["centralised, LoRA"]
    base = ours["eval"]["before"]
    rows = [["base", f"{base['loss']:.3f}", f"{base['exact_match']:.1%}", f"{base['rouge_l']:.1%}", "", "", ""]]
    for label, summary in results.items():
        after = summary["eval"]["after"]
        up, down = (summary.get(f"payload_{way}_bytes_per_client_round") for way in ("up", "down"))
        traffic = f"{up:.0f} / {down:.0f}" if up else ""
        row = [label, f"{after['loss']:.3f}", f"{after['exact_match']:.1%}", f"{after['rouge_l']:.1%}", traffic]
        rows.append([*row, f"{summary['peak_rss_bytes'] / 2**30:.2f}", f"{summary['seconds']:.0f}"])
    notes = []
    for key in ("loss", "exact_match", "rouge_l"):
        gap = best["eval"]["after"][key] - base[key]
        closed = (ours["eval"]["after"][key] - base[key]) / gap
        notes.append(f"- gap between base and centralised LoRA closed by the federation, {key}: {closed:.0%}")
    alone = [s["eval"]["after"]["loss"] for label, s in results.items() if "alone" in label]
    notes.append(f"- best household alone: loss {min(alone):.3f}, federated {ours['eval']['after']['loss']:.3f}")
    columns = ["run", "loss", "exact match", "ROUGE-L", "payload up / down (B per client and round)"]
    write_table(path, "Households", [*columns, "peak memory (GiB)", "seconds"], rows, notes)


if __name__ == "__main__":
    main()
