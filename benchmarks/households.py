"""Households: federated against each household alone and against centralised LoRA, under the same local compute.

    python benchmarks/households.py --output runs/households

Every run sees the same rows per step; the union of all households' held-out rows is the measure. Prints a table and
the share of the gap between base and centralised LoRA that the federation closes; writes households.json and .md.
"""

import argparse
from pathlib import Path

from common import environment, figure, run_recipe, write_results

HOUSEHOLDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/households"))
    parser.add_argument("--households", type=int, default=HOUSEHOLDS)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--local-steps", type=int, default=5)
    parser.add_argument("--limit", type=int, default=120, help="held-out rows, spread over the households")
    parser.add_argument("--only", nargs="*", default=None, help="names of the runs to do, of those the table lists")
    args = parser.parse_args()
    shared = [f"data.path=households:{args.households}", "data.system=''", f"evaluation.limit={args.limit}"]
    together = [f"rounds={args.rounds}", f"local_steps={args.local_steps}"]
    steps = args.rounds * args.local_steps
    # Centralised and alone: as many optimizer steps as one client makes. Centralised takes the rows of all clients
    # in each step, so that the rows seen are those of the federation; a household alone has only its own.
    central = ["schedule=all", f"rounds={args.rounds}", f"local_steps={args.local_steps}"]
    plans = {
        "federated kilotune": ("kilotune", [*shared, *together]),
        "centralised LoRA": ("local_lora", [*shared, f"steps={steps}", f"batch_size={16 * args.households}", *MICRO]),
    }
    for name in household_names(args.households):
        plans[f"{name} alone, LoRA"] = ("local_lora", [*shared, f"steps={steps}", f"data.client={name}"])
    del central
    results = {}
    for label, (recipe, overrides) in plans.items():
        if args.only is None or label in args.only:
            results[label] = run_recipe(recipe, overrides, args.output / label.replace(" ", "_").replace(",", ""))
            print(figure(label, results[label]), flush=True)
    write_results(args.output / "households", environment(), results, gap(results))


MICRO = ["micro_batch_size=16"]


def household_names(count: int) -> list[str]:
    from kilotune.engine.households import names

    return names()[:count]


def gap(results: dict) -> dict[str, float]:
    """Shares of the way from base to centralised LoRA."""
    if {"federated kilotune", "centralised LoRA"} - set(results):
        return {}
    ours, best = results["federated kilotune"]["eval"], results["centralised LoRA"]["eval"]
    return {
        f"gap closed, {key}": (ours["before"][key] - ours["after"][key]) / (ours["before"][key] - best["after"][key])
        for key in ("loss", "exact_match")
    }


if __name__ == "__main__":
    main()
