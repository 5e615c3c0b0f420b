"""The default recipe on the real model: it learns, its seed file rebuilds it, and its export is the same model."""

import pytest

from kilotune.engine.afterwards.measure import export, measure, replay
from kilotune.engine.composing.compose import compose
from kilotune.engine.session import federate

pytestmark = pytest.mark.real

SETTINGS = [
    "data.path=households:2",
    "data.system=",
    "rounds=2",
    "local_steps=2",
    "batch_size=4",
    "evaluation.limit=12",
    "evaluation.generate=false",
]


def quiet(event: dict) -> None:
    """Nobody watches."""


def test_the_default_recipe_learns_in_kilobytes_and_everything_made_of_it_agrees(tmp_path):
    """Kills: progress on the tiny model only; an export that is another model than the run."""
    summary = federate(compose("kilotune", "federate", SETTINGS), tmp_path / "run", quiet)
    before, after = summary["eval"]["before"]["loss"], summary["eval"]["after"]["loss"]
    assert after < before - 0.8
    assert summary["payload_up_bytes_per_client_round"] <= 4400
    assert summary["payload_down_bytes_per_client_round"] <= 8800
    seed_file = tmp_path / "run" / "final.seed"
    assert seed_file.stat().st_size < 25_000
    assert replay(seed_file, None, quiet)["digest"] == summary["digest"]
    written = export(str(seed_file), tmp_path / "tuned", "hf", None, quiet)
    assert written["digest"] == summary["digest"]
    again = measure(str(tmp_path / "tuned"), "households:2", "test", 12, 0, 512, None, None, quiet)
    assert again["overall"]["num_examples"] == 12
    assert again["overall"]["loss"] < before
