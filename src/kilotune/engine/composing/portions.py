"""Portions: groups of clients that train some of the recipe's matrices only, each with a rank of its own, on batches
and in a number format that fit their machines (`clients.ranks`, `batch_size`, `precision`; see `budgets`).

A codec that gives `rank_each` says the rank of every pair.
"""

from typing import TYPE_CHECKING

from kilotune.engine.composing.pairs import PAIR, numbers, rank

if TYPE_CHECKING:
    from kilotune.engine.composing.plan import Plan


def portion_clashes(plan: "Plan") -> list[str]:
    """What clients of different portions do not go with."""
    recipe, kind, up, problems = plan.recipe, plan.parametrization, plan.uplink, []
    if any(group.batch_size for group in recipe.clients) and plan.privacy is not None:
        problems.append(
            f"clients.batch_size: privacy {plan.privacy.method_name()!r} counts on one size of batches. Remove it."
        )
    if "rank_each" in plan.downlink.gives and "rank_sum" in plan.aggregation.gives:
        problems.append(
            f"downlink {plan.downlink.method_name()!r} has room for the recipe's rank, but aggregation "
            f"{plan.aggregation.method_name()!r} makes pairs of any. Use downlink: low_rank."
        )
    if not getattr(kind, "ranks", {}) and not any(group.ranks for group in recipe.clients):
        return problems
    if PAIR not in kind.gives or "fresh_start" not in kind.gives:
        problems.append(
            f"clients.ranks: with parametrization {kind.method_name()!r} a client would go without the matrices "
            "that it leaves out. Use parametrization: lora_svd, whose rounds are merged, or remove it."
        )
    elif plan.estimator.forward_only and "directions" not in kind.gives:
        problems.append(
            f"clients.ranks: estimator {plan.estimator.method_name()!r} probes all factors of parametrization "
            f"{kind.method_name()!r}. Use parametrization: lora_svd, or estimator: backprop."
        )
    if "rank_each" not in up.gives:
        problems.append(
            f"clients.ranks: uplink {up.method_name()!r} cannot say what was not trained. Use uplink: pair_ranks."
        )
    if "equal_ranks" in plan.aggregation.needs:
        problems.append(
            f"clients.ranks: aggregation {plan.aggregation.method_name()!r} needs clients of one rank. Use "
            "aggregation: holders."
        )
    if recipe.arms.pruning:
        problems.append("clients.ranks: with arms the server chooses the ranks. Remove one of them.")
    return problems


def numbers_up(plan: "Plan", follower: "Plan", numel: dict[str, int]) -> dict[str, int]:
    """Numbers of each tensor that a client of this plan sends; `numel` counts those of the recipe's rank."""
    if not getattr(follower.parametrization, "ranks", {}):
        return numbers(plan, numel, rank(follower))
    most, kept = rank(plan), follower.parametrization.components(list(numel))  # type: ignore[attr-defined]
    return {name: size // most * kept[name] for name, size in numel.items()}
