"""Every shipped recipe runs on the tiny model, with bytes as predicted; every one names its source."""

import math

import pytest

from federating import plan, quiet
from kilotune.engine.alone import tune
from kilotune.engine.composing.compose import compose, read, shipped
from kilotune.engine.planning.planner import payload_bytes
from kilotune.engine.rounds.federation import Federation
from kilotune.engine.session import federate

FEDERATED = [name for name in shipped() if read(name).get("rounds")]
SMALL = ("batch_size=2", "evaluation.limit=3")
LOCAL = [name for name in shipped() if read(name).get("steps")]


def test_every_recipe_is_either_federated_or_local_and_names_its_source():
    assert sorted(FEDERATED + LOCAL) == shipped()
    for name in shipped():
        assert read(name)["title"], name
        assert read(name)["source"], name


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_composes_as_it_stands(name):
    """Kills: a recipe that works only with the changes a test makes."""
    compose(name, "tune" if name in LOCAL else "federate")


@pytest.mark.parametrize("name", FEDERATED)
def test_a_federated_recipe_runs_two_rounds_with_the_bytes_predicted(base, data, tmp_path, name, monkeypatch):
    """Kills: a part that only composes; a byte formula that is not the payload's length."""
    recipe = plan(base, data, name, *SMALL)
    shapes: dict[str, tuple[int, ...]] = {}
    run = Federation.run

    def watched(self):
        shapes.update(self.replica.shapes)
        return run(self)

    monkeypatch.setattr(Federation, "run", watched)
    summary = federate(recipe, tmp_path / "run", quiet)
    assert summary["rounds"] == 2
    assert math.isfinite(summary["eval"]["after"]["loss"])
    assert summary["digest"] != summary["base_digest"]
    numel = {name: math.prod(shape) for name, shape in shapes.items()}
    predicted = payload_bytes(recipe, numel, summary["clients"])
    for way in ("up", "down"):
        key = f"payload_{way}_bytes_per_client_round"
        codec = recipe.uplink if way == "up" else recipe.downlink
        # What travels follows the change, the lengths of rows or the arms, so the prediction is a bound.
        if name == "ferret" or not codec.exact or recipe.recipe.split.enabled or recipe.recipe.arms.ranks:
            assert 0.05 * predicted[key] < summary[key] <= predicted[key], key
        else:  # two pairs of slack: six draws from 64 directions meet more or less often
            assert summary[key] == pytest.approx(predicted[key], abs=0.05 * predicted[key] + 12), key


@pytest.mark.parametrize("name", LOCAL)
def test_a_local_recipe_tunes_and_cut_in_the_middle_resumes_to_the_same_digest(base, data, tmp_path, name):
    """Kills: a checkpoint without moments, without the position in the data, or without the estimator's memory."""
    recipe = plan(base, data, name, *SMALL)
    whole = tune(recipe, tmp_path / "whole", quiet)
    assert whole["command"] == "tune"
    assert whole["steps"] == 4
    assert math.isfinite(whole["eval"]["after"]["loss"])

    class Killed(BaseException):
        pass

    def dying(event):
        if (event["event"] == "step" and event["step"] == 3) or (event["event"] == "round" and event["round"] == 1):
            raise Killed

    with pytest.raises(Killed):
        tune(recipe, tmp_path / "cut", dying)
    assert tune(recipe, tmp_path / "cut", quiet)["digest"] == whole["digest"]


def test_ctrl_c_in_a_step_saves_that_step_and_the_same_call_goes_on(base, data, tmp_path):
    """Kills: losing the steps since the last checkpoint; stopping in the middle of an update."""
    import signal

    recipe = plan(base, data, "local_lora", "steps=20", *SMALL)  # a checkpoint every two steps
    whole = tune(recipe, tmp_path / "whole", quiet)

    def interrupted(event):
        if event["event"] == "step" and event["step"] == 5:
            signal.raise_signal(signal.SIGINT)

    steps = []
    with pytest.raises(KeyboardInterrupt):
        tune(recipe, tmp_path / "cut", interrupted)
    assert tune(recipe, tmp_path / "cut", steps.append)["digest"] == whole["digest"]
    assert next(e["step"] for e in steps if e["event"] == "step") == 6
