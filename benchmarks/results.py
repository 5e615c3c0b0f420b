"""Results: every speed and memory benchmark in turn; one table per point in benchmarks/results.md, headlines in README.

    python benchmarks/results.py --data DIR [--peers PYTHON] [--only replay federation]

Points that are not run again keep their table and their headlines. Everything takes about 40 minutes.
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
RESULTS, README = HERE / "results.md", HERE.parent / "README.md"
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
    contents = []
    for point, words in points.items():
        if not args.only or point in args.only:
            run(point, [*words, "--output", str(args.output / point)])
            contents.append(json.loads((args.output / f"{point}.json").read_text(encoding="utf-8")))
    text, readme = (path.read_text(encoding="utf-8") for path in (RESULTS, README))
    RESULTS.write_text(page(text, contents), encoding="utf-8")
    README.write_text(with_headlines(readme, text, contents), encoding="utf-8")


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


def page(old: str, contents: list[dict[str, Any]]) -> str:
    """One section per point: table, notes, machine. Those of the old page stay where there is nothing new."""
    made = sections(old)
    for content in contents:
        columns = list(content["rows"][0]) if content["rows"] else COLUMNS
        facts = "; ".join(f"{key} {value}" for key, value in content["environment"].items())
        lines = [f"## {content['title']}", "", *table(columns, [list(row.values()) for row in content["rows"]])]
        made[content["title"]] = "\n".join([*lines, "", *content["notes"], "", f"<sub>{facts}</sub>"])
    head = "# Results\n\nWritten by `make bench`. Ratios of one run on one machine; a shared one, so they vary."
    return "\n\n".join([head, *made.values()]) + "\n"


def sections(text: str) -> dict[str, str]:
    """Title -> section of a page."""
    parts = text.split("\n## ")[1:]
    return {part.partition("\n")[0]: "## " + part.strip() for part in parts}


def with_headlines(readme: str, old: str, contents: list[dict[str, Any]]) -> str:
    """The README with the headlines between its two marks; those of points that were not run again stay."""
    before, rest = readme.split(START)
    shown, after = rest.split(END)
    lines, fresh = table(COLUMNS[:-1], []), {content["title"]: content["headlines"] for content in contents}
    for title, section in {**sections(old), **fresh}.items():
        if title in fresh:
            lines += [f"| {' | '.join(cells[:-1])} |" for cells in fresh[title]]
        else:
            rows = {line.split(" | ")[0] for line in section.split("\n") if line.startswith("| ")}
            lines += [line for line in shown.split("\n")[3:] if line.split(" | ")[0] in rows]
    return "\n".join([before + START, *lines, END + after])


if __name__ == "__main__":
    main()
