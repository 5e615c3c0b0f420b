"""The byte ladder: equal compute for all, runs that are kept or tried again, and who is on the frontier."""

import gzip
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from argparse import Namespace
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import byte_ladder
from byte_ladder import PASSES, Ladder, Setting, federated, same_compute
from kilotune.engine.composing.compose import compose, for_group
from kilotune.engine.runfolder import METRICS
from kilotune.estimator.zeroth_order import NUM_PROBES
from ladder_figure import GAP, apart, numbers, scatter, together
from ladder_page import Point, Rungs

SETTING = Setting("tiny", clients=2, rounds=4, local_steps=4, batch_size=2, limit=4, every=2)


def passes(plan) -> float:
    """Forward passes of one client over the whole run."""
    recipe = plan.recipe
    steps = recipe.rounds * recipe.local_steps
    if not plan.estimator.forward_only:
        return PASSES * steps
    measured = steps / plan.estimator.probe_every if plan.optimizer.lr == "auto" else 0
    return 2 * steps + (1 + 2 * NUM_PROBES) * measured


@pytest.mark.parametrize("recipe", federated())
def test_every_recipe_has_the_compute_of_all_others(recipe):
    """Kills: a protocol that looks better because it may work more."""
    plan = compose(recipe, "federate", list(same_compute(recipe, SETTING, ("seed=0",))))
    allowed = PASSES * SETTING.rounds * SETTING.local_steps
    for follower in [plan, *(for_group(plan, index) for index in range(len(plan.recipe.clients)))]:
        assert allowed - 3 * PASSES <= passes(follower) <= allowed
        assert follower.recipe.batch_size == SETTING.batch_size
    assert plan.recipe.seed == 0


def point(label: str, size: int, loss: float | None) -> Point:
    result = {"bytes": size, "after": {"loss": loss, "exact_match": 0.5}, "curve": [[0, 3.0], [4, loss]]}
    return Point(label, label, {**result, "up": 1, "down": 1, "rounds": 4, "peak_rss_bytes": 2**30, "seconds": 1})


def test_the_frontier_has_those_that_nobody_beats_for_as_many_bytes():
    """Kills: a frontier that keeps what costs more and learns less; one that drops equals; a loss of NaN on top."""
    table = [(10, 2.0), (10, 1.9), (20, 1.9), (30, 1.0), (40, 1.5), (50, 0.5), (5, None)]
    points = [point(str(n), *facts) for n, facts in enumerate(table)]
    rungs = Rungs(points, {"base": (3.0, 0.0)}, {}, [], 4)
    assert [p.label for p in rungs.frontier] == ["1", "3", "5", "6"]
    ours = replace(rungs, points=[*points, point("kilotune", 35, 1.2)])
    (verdict,) = ours.verdicts()
    assert "Beaten at its bytes or fewer by `3` (loss 1.000 for 30 B)." in verdict
    (verdict,) = replace(rungs, points=[*points, point("kilotune", 35, 0.9)]).verdicts()
    assert "None of the 5 protocols with as many bytes or fewer beats it." in verdict


def test_the_figure_shows_every_protocol_once_and_covers_no_label():
    points = [point(str(n), 10 ** (1 + n % 3) + n, 1.0 + n / 100) for n in range(12)]
    drawn = ElementTree.fromstring(scatter("all", Rungs(points, {"base": (3.0, 0.0)}, {}, [], 4)))
    assert len(drawn.findall("circle")) == len(points)
    boxes = [(100.0 + n, 20.0, 50.0 + n % 2, False) for n in range(6)] + [(400.0, 20.0, 50.0, False)]
    heights = apart(boxes)
    assert heights[-1] == 50.0
    near = sorted(heights[:6])
    assert all(b - a >= GAP for a, b in pairwise(near))
    assert together([(0.0, 0.0), (1.0, 2.0), (50.0, 0.0), (2.0, 1.0)], [0, 1, 2, 3]) == [(0, 1, 3), (2,)]
    assert numbers((0, 3, 4, 5, 9, 10)) == "1, 4–6, 10, 11"


@pytest.fixture
def ladder(tmp_path, monkeypatch) -> Ladder:
    rows = [
        {"client": f"c{n % 3}", "instruction": f"say {n}", "output": "on", "split": "test" if n > 8 else "train"}
        for n in range(12)
    ]
    with gzip.open(tmp_path / "clinc150.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(byte_ladder, "federated", lambda: ["kilotune", "fedavg_lora"])
    monkeypatch.setattr(byte_ladder, "DIALS", {"kilotune": {"M 64": ("basis.size=64",)}})
    facts = {"model": "smollm2-135m", "clients": 2, "rounds": 4, "local_steps": 4, "batch_size": 2, "limit": 4}
    places = {"data": tmp_path, "output": tmp_path / "out", "page": tmp_path / "page.md", "rows": ["clinc150"]}
    return Ladder(Namespace(**facts, **places, every=2, tuned=False))


def test_finished_runs_are_kept_failed_ones_told_and_tried_again(ladder, monkeypatch):
    """Kills: hours of runs done twice, in another checkout too; a failure that disappears from the page; figures of
    another setting."""
    calls, broken = [], {"fedavg_lora"}

    def run(recipe, overrides, folder):
        calls.append(recipe)
        if recipe in broken:
            sys.stderr.flush()
            byte_ladder.os.write(2, b"kilotune: no room left\n")
            raise subprocess.CalledProcessError(1, recipe)
        score = {"loss": 1.5, "exact_match": 0.25}
        sizes = {"payload_up_bytes_per_client_round": 10, "payload_down_bytes_per_client_round": 20}
        folder.mkdir(parents=True)
        events = [{"event": "round", "clients": 2}, {"event": "evaluation", "round": 4, "overall": score}]
        (folder / METRICS).write_text("".join(json.dumps(event) + "\n" for event in events))
        facts = {"command": "federate", "rounds": 4, "clients": 2, "seconds": 1, "peak_rss_bytes": 2**30, "digest": "d"}
        return {**facts, **sizes, "eval": {"before": {**score, "loss": 3.0}, "after": score}}

    monkeypatch.setattr(byte_ladder, "run_recipe", run)
    for name in ("kilotune", "fedavg_lora"):
        ladder.climb("clinc150", name)
    page = ladder.page.read_text()
    assert "`fedavg_lora` failed: kilotune: no room left" in page
    for label in ("kilotune", "kilotune, M 64"):
        assert f"| **{label}** \\* | 120 | 10 | 20 | 4 | 1.500 |" in page
    broken.clear()
    for name in ("kilotune", "fedavg_lora"):
        ladder.climb("clinc150", name)
    assert calls == ["kilotune", "kilotune", "fedavg_lora", "fedavg_lora"]
    page = ladder.page.read_text()
    assert "failed" not in page

    elsewhere = Ladder(Namespace(**{**vars(ladder.args), "output": ladder.output / "new"}))
    for name in ("kilotune", "fedavg_lora"):
        elsewhere.climb("clinc150", name)
    elsewhere.write_page()
    assert len(calls) == 4
    assert ladder.page.read_text() == page
    longer = Ladder(Namespace(**{**vars(ladder.args), "rounds": 5, "output": ladder.output / "new"}))
    longer.climb("clinc150", "fedavg_lora")
    assert len(calls) == 5


def test_the_file_of_a_run_is_named_by_what_decides_its_figures(ladder):
    """Kills: figures of another setting taken for this one's; runs made anew because a folder has moved."""
    job = ladder.job("clinc150", "kilotune", "kilotune", ladder.own["kilotune"])
    assert replace(job, places=("base=elsewhere",)).path == job.path
    assert replace(job, changes=(*job.changes, "optimizer.lr=0.5")).path != job.path
    assert replace(job, setting=replace(job.setting, limit=5)).path != job.path
