"""The page of results and the README's headlines: what is not measured again stays, what is replaces the old."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from results import END, README, RESULTS, START, page, with_headlines

NEW = {
    "title": "Federation",
    "rows": [{"what": "a round", "ours": "1 s", "spread": "5 runs"}],
    "notes": ["A note."],
    "environment": {"cpu": "2 cores"},
    "headlines": [["a round", "1 s", "2 s", "0.5", "≤ 1", "hit", "5 runs"]],
}


def test_a_point_that_is_run_again_replaces_its_section_and_nothing_else():
    """Kills: figures of other points lost by `--only`; headlines kept of a point that was run again."""
    text, readme = (path.read_text(encoding="utf-8") for path in (RESULTS, README))
    assert page(text, []) == text
    assert with_headlines(readme, text, []) == readme
    fresh = page(text, [NEW])
    old, new = text.split("\n## "), fresh.split("\n## ")
    changed = [part for part in new if part not in old]
    assert [part.splitlines()[0] for part in changed] == ["Federation"]
    assert "| a round | 1 s | 5 runs |" in changed[0]
    lines = with_headlines(readme, text, [NEW]).split(START)[1].split(END)[0].splitlines()
    before = readme.split(START)[1].split(END)[0].splitlines()
    assert [line for line in lines if line not in before] == ["| a round | 1 s | 2 s | 0.5 | ≤ 1 | hit |"]
    gone = [line for line in before if line not in lines]
    assert gone
    assert all(line in text.split("## Federation")[1].split("## ")[0] for line in [g[:-1] for g in gone])
    elsewhere = [line for line in before if line not in gone]
    assert elsewhere == [line for line in lines if line in before]
