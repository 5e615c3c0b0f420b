"""The planner against runs: predicted and measured memory, bytes and time of recipes it was never fitted to."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from common import Measurement, fresh, run_recipe, write_measurements

RECIPES = {"kilotune_zeroth": 3, "fedavg_lora": 2, "local_full": 4}  # recipe: local steps, or steps
SMALL = ("batch_size=4", "data.limit=40", "evaluation.limit=16", "evaluation.max_new_tokens=8")
TARGETS = {"memory": 0.15, "bytes": 0.02, "time": 0.30}


def settings(recipe: str, steps: int, data: Path) -> list[str]:
    """A short run of the recipe on the benchmark's rows."""
    federated = ["rounds=2", f"local_steps={steps}", "partition.name=iid", "partition.num_clients=2"]
    length = [f"steps={steps}"] if recipe.startswith("local_") else federated
    return [f"data.path={data}", *SMALL, *length]


def predict(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """What `kilotune plan` says, measured anew."""
    sets = [word for assignment in overrides for word in ("--set", assignment)]
    words = [sys.executable, "-m", "kilotune", "plan", recipe, *sets, "--probe", "--format", "json"]
    found = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    content: dict[str, Any] = json.loads(found)
    return content


def seconds_of(run: Path) -> float:
    """Seconds of all steps (at their median, so that one hiccup of the machine is not all) or of all rounds."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [event["seconds"] for event in events if event["event"] == "step"]
    return median(steps) * len(steps) if steps else sum(e["seconds"] for e in events if e["event"] == "round")


def rows_of(recipe: str, predicted: dict[str, Any], summary: dict[str, Any], seconds: float) -> list[Measurement]:
    """One line per quantity: predicted beside measured, and how far apart they are."""
    pairs = {"memory": (predicted["peak_rss_bytes"], summary["peak_rss_bytes"], 1e9, "GB")}
    for way in ("up", "down"):
        key = f"payload_{way}_bytes_per_client_round"
        if key in predicted:
            pairs[f"bytes {way}"] = (predicted[key], summary[key], 1, "B")
    pairs["time"] = (predicted["seconds"], seconds, 1, "s")
    found = []
    for what, (ours, real, unit, name) in pairs.items():
        target = TARGETS[what.split()[0]]
        form = ",.0f" if name == "B" else ".2f"
        said, was = f"{ours / unit:{form}} {name}", f"{real / unit:{form}} {name} measured"
        found.append(
            Measurement(
                f"plan of {recipe}, {what}: off by", said, was, abs(ours / real - 1), target, "lower", headline=True
            )
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="rows with labels, e.g. clinc150.jsonl.gz")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/planner"))
    parser.add_argument("--recipe", action="append", help="another one; repeatable")
    arguments = parser.parse_args()
    found: list[Measurement] = []
    for recipe in arguments.recipe or RECIPES:
        overrides = settings(recipe, RECIPES.get(recipe, 2), arguments.data)
        run = arguments.output.parent / "planner-runs" / recipe
        fresh(run)
        predicted = predict(recipe, overrides)
        summary = run_recipe(recipe, overrides, run)
        found += rows_of(recipe, predicted, summary, seconds_of(run))
    notes = [
        "The ratio is |predicted / measured - 1|. Nothing in the planner was fitted to runs of these recipes: times"
        " come from the recipe's own step on models of one and three layers, measured just before the run.",
        f"Load average at the end: {os.getloadavg()[0]:.1f}.",
    ]
    write_measurements(arguments.output, "Planner: predicted against measured", found, notes)


if __name__ == "__main__":
    main()
