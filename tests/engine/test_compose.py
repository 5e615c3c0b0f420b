"""Recipes compose into plans, or say everything that is wrong with them at once."""

import pytest

from kilotune.core.errors import IncompatibleError, RecipeError
from kilotune.engine.composing.compose import build, compose, for_group, override, read, shipped


def problems(content, mode="federate"):
    with pytest.raises(RecipeError) as caught:
        build(content, mode)
    return caught.value.problems


def test_all_mistakes_are_reported_at_once_with_the_nearest_name():
    """Kills: stopping at the first mistake; a message without a fix."""
    found = problems(
        {
            "rounds": 0,
            "local_stpes": 3,
            "optimizer": {"name": "adam"},
            "basis": {"name": "tiled", "sise": 64},
            "data": {"max_lenght": 3},
        }
    )
    text = "\n".join(found)
    assert "rounds: got 0, expected greater than or equal to 1." in text
    assert "local_stpes: no such key. Did you mean 'local_steps'?" in text
    assert "optimizer.name: got 'adam', expected one of adamw, " in text
    assert "Did you mean 'adamw'?" in text
    assert "basis.sise: no such key. Did you mean 'size'?" in text
    assert "data.max_lenght: no such key. Did you mean 'max_length'?" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"uplink": "seed_scalar", "aggregation": "seed_sum", "optimizer": {"name": "sgd"}},
            "uplink 'seed_scalar' needs 'seed_log', but estimator 'backprop' does not give it. "
            "Use estimator: zeroth_order, or uplink: coefficients.",
        ),
        (
            {"parametrization": "full", "uplink": "coefficients"},
            "uplink 'coefficients' needs a basis. Use parametrization: subspace, or uplink: dense.",
        ),
        (
            {"aggregation": "seed_sum"},
            "aggregation 'seed_sum' cannot combine what uplink 'coefficients' sends. Use aggregation: mean.",
        ),
        (
            {"optimizer": {"name": "adamw", "lr": "auto"}},
            "optimizer.lr: auto needs 'curvature', which estimator 'backprop' does not measure. "
            "Give a number, or use estimator: zeroth_order.",
        ),
    ],
)
def test_parts_that_do_not_fit_name_both_and_a_working_pair(content, message):
    """Kills: a combination that starts and fails in the middle of a round."""
    with pytest.raises(IncompatibleError) as caught:
        build({"rounds": 1, **content}, "federate")
    assert message in caught.value.problems


def test_a_setting_without_effect_is_an_error():
    """Kills: silently ignoring what the user wrote."""
    assert (
        "basis: has no effect with parametrization 'full'"
        in problems({"rounds": 1, "parametrization": "full", "basis": "tiled"})[0]
    )
    assert problems({"steps": 4, "schedule": "all"}, "tune")[0].startswith("schedule: has no effect")
    assert problems({"steps": 4, "rounds": 4}, "federate")[0].startswith("steps: has no effect")


def test_the_recipe_id_covers_what_both_ends_share_and_nothing_private():
    """Kills: an id that changes with a local path; an id that ignores a hyperparameter."""
    same = compose("kilotune", "federate", ["data.path=a.jsonl", "rounds=3", "evaluation.limit=7", "threads=1"])
    other = compose("kilotune", "federate", ["optimizer.lr=0.01"])
    plan = compose("kilotune", "federate")
    assert plan.id == same.id
    assert plan.id != other.id


def test_a_resolved_recipe_composes_to_itself():
    """Kills: a run folder's recipe.yaml that means something else than the recipe it came from."""
    for name in shipped():
        mode = "tune" if read(name).get("steps") else "federate"
        plan = compose(name, mode)
        again = build(plan.resolved(), mode)
        assert again.id == plan.id
        assert again.resolved() == plan.resolved()


def test_overrides_reach_nested_keys_and_keep_the_rest():
    content = override({"optimizer": "sgd", "rounds": 1}, ["optimizer.lr=1e-2", "data.path=x.json", "rounds=4"])
    assert content == {"optimizer": {"name": "sgd", "lr": "1e-2"}, "rounds": 4, "data": {"path": "x.json"}}
    with pytest.raises(RecipeError, match="expected KEY=VALUE"):
        override({}, ["rounds"])
    with pytest.raises(RecipeError, match="rounds is a value, not a section"):
        override({"rounds": 1}, ["rounds.x=2"])


def test_an_unknown_recipe_names_the_nearest_and_bad_yaml_names_the_line(tmp_path):
    with pytest.raises(RecipeError, match="Did you mean 'fedkseed'"):
        read("fedkseeed")
    path = tmp_path / "mine.yaml"
    path.write_text("rounds: 3\noptimizer: {name: sgd\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml:\d+: not YAML"):
        read(path)


def test_client_groups_take_the_clients_in_order_of_name():
    """Kills: a group that depends on the order in which clients appear."""
    plan = compose("mixed", "federate")
    roster = ["d", "b", "a", "c"]
    assert [plan.group_of(name, roster) for name in ("a", "b", "c", "d")] == [0, 0, -1, -1]
    follower = for_group(plan, 0)
    assert follower.estimator.method_name() == "zeroth_order"
    assert follower.uplink == plan.uplink
    assert follower.root(3) == plan.root(3)


def test_roots_are_fresh_each_round_or_fixed_for_the_run():
    fresh, fixed = compose("kilotune", "federate"), compose("fedkseed", "federate")
    assert len({fresh.root(r) for r in range(5)}) == 5
    assert len({fixed.root(r) for r in range(5)}) == 1
