"""Results: every speed and memory benchmark in turn; one table per point in benchmarks/results.md, headlines in README.

    python benchmarks/results.py --data DIR [--peers PYTHON] [--only replay federation]

Points that are not run again keep the figures of their last run in --output. Everything takes about 40 minutes.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import COLUMNS

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
START, END = "<!-- headlines of benchmarks/results.md -->", "<!-- end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with clinc150.jsonl.gz and dolly.jsonl.gz")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument("--peers", default=sys.executable, help="Python of the peers' environment")
    parser.add_argument("--only", nargs="*", help="points to run; default: all")
    args = parser.parse_args()
    rows = str(args.data / "clinc150.jsonl.gz")
    points = {
        "replay": [],
        "zeroth_order": ["--data", rows],
        "first_order": ["--data", str(args.data), "--peers", args.peers],
        "federation": [],
        "startup": [],
        "scaling": [],
        "planner": ["--data", rows],
    }
    for point, words in points.items():
        if not args.only or point in args.only:
            run(point, [*words, "--output", str(args.output / point)])
    found = {point: args.output / f"{point}.json" for point in points}
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in found.values() if path.exists()]
    (HERE / "results.md").write_text(page(contents), encoding="utf-8")
    fill_readme([row for content in contents for row in content.get("headlines", [])])


def run(point: str, words: list[str]) -> None:
    """One script; its tables go to the terminal as they are finished."""
    started = time.monotonic()
    print(f"== {point}", flush=True)
    subprocess.run([sys.executable, str(HERE / f"{point}.py"), *words], check=True)
    print(f"== {point}: {time.monotonic() - started:.0f} s", flush=True)


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown."""
    return [
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(cells)} |" for cells in rows),
    ]


def page(contents: list[dict[str, Any]]) -> str:
    """One section per point: table, notes, machine."""
    lines = ["# Results", "", "Written by `make bench`. Ratios of one run on one machine; a shared one, so they vary."]
    for content in contents:
        columns = list(content["rows"][0]) if content["rows"] else COLUMNS
        facts = "; ".join(f"{key} {value}" for key, value in content["environment"].items())
        lines += ["", f"## {content['title']}", "", *table(columns, [list(row.values()) for row in content["rows"]])]
        lines += ["", *content["notes"], "", f"<sub>{facts}</sub>"]
    return "\n".join(lines) + "\n"


def fill_readme(headlines: list[list[str]]) -> None:
    """The headlines between the two marks of the README."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    lines = table(COLUMNS[:-1], [cells[:-1] for cells in headlines])
    README.write_text("\n".join([before + START, *lines, END + after]), encoding="utf-8")


if __name__ == "__main__":
    main()
