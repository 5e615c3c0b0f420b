"""Privacy: what client-level differential privacy costs in quality, at several budgets, on the same rows and clients.

    python benchmarks/privacy.py --data FOLDER --output runs/privacy

FOLDER holds clinc150.jsonl.gz (or name another file). Its training rows are dealt out to `--clients` clients; every
run is the recipe `private_central` with all of them in every round, once without privacy and once per epsilon.
The noise is secret, so figures move a little from run to run; with few clients they move much.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from common import figure, run_recipe, write_table

STYLE = (
    "<style>text{font:12px system-ui,sans-serif;fill:#1d2125}.grid{stroke:#dcdfda}.middle{text-anchor:middle}"
    ".end{text-anchor:end}polyline{fill:none;stroke:#1a5fa0;stroke-width:2}circle{fill:#1a5fa0}"
    "polyline.c2{stroke:#a8480a}circle.c2{fill:#a8480a}</style>"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with clinc150.jsonl.gz, or a file of rows")
    parser.add_argument("--output", type=Path, default=Path("runs/privacy"))
    parser.add_argument("--clients", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--size", type=int, default=128, help="directions M: the noise grows with its root")
    parser.add_argument("--lr", type=float, default=0.08)
    parser.add_argument("--limit", type=int, default=24, help="held-out rows")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[8.0])
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for epsilon in (None, *args.epsilons):
        label = "no privacy" if epsilon is None else f"epsilon {epsilon:g}"
        results[label] = run_recipe("private_central", settings(args, epsilon), args.output / label.replace(" ", "-"))
        print(figure(label, results[label]), flush=True)
    table(args.output / "privacy", results)
    chart(args.output / "privacy.svg", results)


def settings(args: argparse.Namespace, epsilon: float | None) -> list[str]:
    """Overrides of one run. The clip is the norm of one AdamW step, as docs/privacy.md recommends."""
    data = args.data / "clinc150.jsonl.gz" if args.data.is_dir() else args.data
    shared = [
        f"data.path={data}",
        "data.system=",
        f"partition.num_clients={args.clients}",
        f"rounds={args.rounds}",
        f"batch_size={args.batch_size}",
        f"basis.size={args.size}",
        f"optimizer.lr={args.lr}",
        f"evaluation.limit={args.limit}",
        "evaluation.max_new_tokens=8",
    ]
    if epsilon is None:
        return [*shared, "privacy=null"]
    clip = args.lr * math.sqrt(args.size)
    return [*shared, f"privacy.clip={clip:.6g}", f"privacy.epsilon={epsilon}", f"privacy.clients={args.clients}"]


def table(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """One row per budget, base first."""
    base = next(iter(results.values()))["eval"]["before"]
    rows = [["base", "", f"{base['loss']:.3f}", f"{base['exact_match']:.1%}", "", ""]]
    for label, summary in results.items():
        after, told = summary["eval"]["after"], summary.get("privacy")
        spent = f"{told['epsilon']:.2f}" if told else ""
        noise = f"{told['noise_multiplier']:.3f}" if told else ""
        rows.append(
            [label, spent, f"{after['loss']:.3f}", f"{after['exact_match']:.1%}", noise, f"{summary['seconds']:.0f}"]
        )
    columns = ["run", "epsilon spent", "loss", "exact match", "noise multiplier", "seconds"]
    told = next(summary["privacy"] for summary in results.values() if "privacy" in summary)
    notes = [
        f"Unit: one {told['unit']}; neighbours: {told['neighbours']}; sampling: {told['sampling']}; "
        f"delta {told['delta']:g}; clip {told['clip']:.3g}; {told['rounds']} rounds."
    ]
    write_table(path, "Quality against epsilon", columns, rows, notes)


def chart(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Held-out loss by epsilon; the run without privacy as a line across."""
    from kilotune.engine.reporting._svg import Series, line_chart

    points = sorted((s["privacy"]["epsilon"], s["eval"]["after"]["loss"]) for s in results.values() if "privacy" in s)
    without = results["no privacy"]["eval"]["after"]["loss"]
    across = Series("no privacy", [(points[0][0], without), (points[-1][0], without)], "c2")
    title = "Held-out loss by epsilon"
    text = line_chart(title, [Series("private", points, "c1"), across], "epsilon", lambda v: f"{v:.3f}")
    text = text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f">{STYLE}", 1)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
