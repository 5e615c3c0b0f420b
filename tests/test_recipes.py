"""Every shipped recipe runs on the tiny model, with bytes as predicted; every one names its source."""

import math

import pytest

from federating import plan, quiet
from kilotune.engine.compose import compose, read, shipped
from kilotune.engine.planner import payload_bytes
from kilotune.engine.session import federate, tune

FEDERATED = [name for name in shipped() if read(name).get("rounds")]
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
def test_a_federated_recipe_runs_two_rounds_with_the_bytes_predicted(base, data, tmp_path, name):
    """Kills: a part that only composes; a byte formula that is not the payload's length."""
    recipe = plan(base, data, name)
    summary = federate(recipe, tmp_path / "run", quiet)
    assert summary["rounds"] == 2
    assert math.isfinite(summary["eval"]["after"]["loss"])
    assert summary["digest"] != summary["base_digest"]
    numel = {name: math.prod(shape) for name, shape in summary_shapes(recipe, base).items()}
    predicted = payload_bytes(recipe, numel, summary["clients"])
    for way in ("up", "down"):
        key = f"payload_{way}_bytes_per_client_round"
        if name == "ferret":  # its budgets follow the norms of the change, so the prediction is a bound
            assert 0.05 * predicted[key] < summary[key] <= predicted[key], key
        else:  # two pairs of slack: six draws from 64 directions meet more or less often
            assert summary[key] == pytest.approx(predicted[key], abs=0.05 * predicted[key] + 12), key


def summary_shapes(recipe, base):
    from kilotune.engine.models import load_base
    from kilotune.engine.replica import Replica

    return Replica(load_base(str(base), writable=True), recipe).shapes


@pytest.mark.parametrize("name", LOCAL)
def test_a_local_recipe_tunes(base, data, tmp_path, name):
    recipe = plan(base, data, name)
    summary = tune(recipe, tmp_path / "run", quiet)
    assert summary["command"] == "tune"
    assert summary["steps"] == 4
    assert math.isfinite(summary["eval"]["after"]["loss"])


@pytest.mark.parametrize("name", LOCAL)
def test_a_local_run_cut_in_the_middle_resumes_to_the_same_digest(base, data, tmp_path, name):
    """Kills: a checkpoint without moments, without the position in the data, or without the estimator's memory."""
    recipe = plan(base, data, name)
    whole = tune(recipe, tmp_path / "whole", quiet)

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

    recipe = plan(base, data, "local_lora", "steps=40")  # a checkpoint every four steps
    whole = tune(recipe, tmp_path / "whole", quiet)

    def interrupted(event):
        if event["event"] == "step" and event["step"] == 6:
            signal.raise_signal(signal.SIGINT)

    steps = []
    with pytest.raises(KeyboardInterrupt):
        tune(recipe, tmp_path / "cut", interrupted)
    assert tune(recipe, tmp_path / "cut", steps.append)["digest"] == whole["digest"]
    assert next(e["step"] for e in steps if e["event"] == "step") == 7
