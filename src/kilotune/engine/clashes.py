"""Clashes: parts of a recipe that are each right and do not fit together; a message names both and a working pair."""

from typing import TYPE_CHECKING

from kilotune.engine.recipe import FEDERATED_ONLY, Recipe

if TYPE_CHECKING:
    from kilotune.engine.compose import Plan
    from kilotune.parametrization import Parametrization

CODECS = ("uplink", "downlink")


def clashes(plan: "Plan") -> list[str]:
    """Pairs of parts that do not fit, each with a pair that does."""
    return [*_uplink_clashes(plan), *_server_clashes(plan), *_rate_clashes(plan)]


def _uplink_clashes(plan: "Plan") -> list[str]:
    up, estimator, optimizer = plan.uplink.method_name(), plan.estimator.method_name(), plan.optimizer.method_name()
    problems = []
    if plan.uplink.takes == "seeds":
        if "seed_log" not in plan.estimator.gives:
            problems.append(
                f"uplink {up!r} needs 'seed_log', but estimator {estimator!r} does not give it. "
                "Use estimator: zeroth_order, or uplink: coefficients."
            )
        if plan.basis is None:
            problems.append(f"uplink {up!r} needs a basis. Use parametrization: subspace, or uplink: dense.")
        if optimizer != "sgd" or getattr(plan.optimizer, "momentum", 0.0) > 0:
            problems.append(
                f"uplink {up!r} sends one scalar per direction, which optimizer {optimizer!r} with its memory cannot "
                "be replayed from. Use optimizer: {name: sgd, momentum: 0}, or uplink: coefficients."
            )
    if up == "coefficients" and plan.basis is None:
        problems.append("uplink 'coefficients' needs a basis. Use parametrization: subspace, or uplink: dense.")
    if up == "projection" and plan.parametrization.method_name() != "full":
        problems.append("uplink 'projection' projects whole weights. Use parametrization: full, or uplink: dense.")
    return problems


def _server_clashes(plan: "Plan") -> list[str]:
    up, down, rule = plan.uplink.method_name(), plan.downlink.method_name(), plan.aggregation.method_name()
    pairs = plan.uplink.takes == "seeds" or up == "projection"
    problems = []
    if pairs != (plan.aggregation.takes == "seeds"):
        good = "seed_sum" if pairs else "mean"
        problems.append(f"aggregation {rule!r} cannot combine what uplink {up!r} sends. Use aggregation: {good}.")
    if pairs and down not in (("projection",) if up == "projection" else ("seed_scalar", "coefficients")):
        problems.append(f"downlink {down!r} cannot send what uplink {up!r} brings. Use downlink: {up}.")
    if not pairs and down in ("seed_scalar", "projection"):
        problems.append(f"downlink {down!r} needs pairs, but uplink {up!r} brings tensors. Use downlink: {up}.")
    outer = plan.server_optimizer
    if pairs and (outer.method_name() != "sgd" or getattr(outer, "momentum", 0.0) > 0):
        problems.append(
            f"server_optimizer {outer.method_name()!r} with its memory needs tensors, but uplink {up!r} brings pairs. "
            "Use server_optimizer: {name: sgd, momentum: 0}, or uplink: coefficients."
        )
    return problems


def _rate_clashes(plan: "Plan") -> list[str]:
    problems = []
    if plan.optimizer.lr == "auto" and "curvature" not in plan.estimator.gives:
        problems.append(
            f"optimizer.lr: auto needs 'curvature', which estimator {plan.estimator.method_name()!r} does not measure. "
            "Give a number, or use estimator: zeroth_order."
        )
    if plan.server_optimizer.lr == "auto":
        problems.append("server_optimizer.lr: got 'auto', expected a number > 0; 1.0 takes the mean as it is.")
    return problems


def mode_problems(recipe: Recipe, mode: str, parametrization: "Parametrization | None") -> list[str]:
    """Keys that are missing or mean nothing where this recipe is to run: `federate` or `tune`."""
    if mode == "federate":
        problems = [] if recipe.rounds else ["rounds: missing. Say how many, e.g. --set rounds=10."]
        if recipe.steps:
            problems.append("steps: has no effect in a federation. Use rounds and local_steps.")
        return problems
    problems = [] if recipe.steps else ["steps: missing. Say how many optimizer steps, e.g. --set steps=100."]
    if recipe.rounds:
        problems.append("rounds: has no effect when one machine tunes alone. Use steps, or `kilotune federate`.")
    alone: tuple[str, ...] = FEDERATED_ONLY
    if parametrization is not None and not parametrization.uses_basis:
        alone = (*FEDERATED_ONLY, *CODECS)
    problems += [
        f"{key}: has no effect when one machine tunes alone. Remove it, or use `kilotune federate`."
        for key in alone
        if getattr(recipe, key)
    ]
    return problems
