"""Pairs: what recipes need whose factor pairs are combined as products, and what clients of several ranks send.

A parametrization that gives `factor_pair` sends the factors themselves (`values`); a rule that needs it combines B A.
`fresh_start`: every round begins without an adapter, so that it may come to a product of any rank. `rank_sum`: it comes
to the sum of the clients' ranks. `any_rank`: a codec that says the rank it sends. `equal_ranks`: a rule for clients of
one rank.
"""

from typing import TYPE_CHECKING

from kilotune.core.factors import component_axes
from kilotune.core.registry import find, names

if TYPE_CHECKING:
    from kilotune.engine.composing.plan import Plan

PAIR = "factor_pair"


def pair_clashes(plan: "Plan") -> list[str]:
    """Parts that take factors for what they are not, each with a pair that works."""
    kind, rule = plan.parametrization, plan.aggregation
    kind_name, rule_name = kind.method_name(), rule.method_name()
    if PAIR not in kind.gives:
        problems = []
        if PAIR in rule.needs:
            good = next(n for n in names("parametrization") if rule.needs - {"equal_ranks"} <= _gives(n))
            problems.append(
                f"aggregation {rule_name!r} combines pairs of factors, but parametrization {kind_name!r} does not send "
                f"them. Use parametrization: {good}, or aggregation: mean."
            )
        if any(group.rank for group in plan.recipe.clients):
            problems.append(
                f"clients.rank: parametrization {kind_name!r} has one rank for all. Use parametrization: lora_merged "
                "with aggregation: flora_stack, or remove it."
            )
        return problems
    if plan.recipe.steps:
        return [
            f"parametrization {kind_name!r} is for rounds of several clients. Use parametrization: {{name: peft, "
            "method: lora}."
        ]
    if PAIR not in rule.needs:
        return [
            f"parametrization {kind_name!r} sends pairs of factors, which aggregation {rule_name!r} takes one by one: "
            "the mean of B A is not the product of means. Use aggregation: flex_lora, or parametrization: {name: peft, "
            "freeze: [lora_A]}, whose mean is exact."
        ]
    return [*_rule_clashes(plan), *_rank_clashes(plan), *_codec_clashes(plan)]


def _gives(parametrization: str) -> frozenset[str]:
    found: frozenset[str] = find("parametrization", parametrization).gives
    return found


def _rule_clashes(plan: "Plan") -> list[str]:
    kind, rule = plan.parametrization.method_name(), plan.aggregation
    problems = []
    if "fresh_start" in rule.needs and "fresh_start" not in plan.parametrization.gives:
        problems.append(
            f"aggregation {rule.method_name()!r} makes pairs of a rank that grows with the clients, from which "
            f"parametrization {kind!r} cannot go on. Use parametrization: lora_merged, or aggregation: flex_lora."
        )
    return problems


def _rank_clashes(plan: "Plan") -> list[str]:
    most, rule = rank(plan), plan.aggregation
    lower = [group.rank for group in plan.recipe.clients if group.rank]
    problems = [
        f"clients.rank: got {found}, expected at most parametrization.rank = {most}." for found in lower if found > most
    ]
    if lower and "equal_ranks" in rule.needs:
        problems.append(
            f"aggregation {rule.method_name()!r} needs clients of one rank. Use aggregation: flex_lora, or remove "
            "clients.rank."
        )
    return problems


def _codec_clashes(plan: "Plan") -> list[str]:
    several = any(group.rank for group in plan.recipe.clients)
    problems = []
    for way, codec, ranks in (
        ("uplink", plan.uplink, several),
        ("downlink", plan.downlink, "rank_sum" in plan.aggregation.gives),
    ):
        if ranks and "any_rank" not in codec.gives:
            problems.append(
                f"{way} {codec.method_name()!r} cannot send pairs whose rank it does not know. Use {way}: low_rank."
            )
    return problems


# -- sizes ------------------------------------------------------------------------------------------------------------


def rank(plan: "Plan") -> int:
    """Components of a pair as this plan's clients train it; 0 without pairs."""
    return int(getattr(plan.parametrization, "rank", 0)) if PAIR in plan.parametrization.gives else 0


def numbers(plan: "Plan", numel: dict[str, int], components: int) -> dict[str, int]:
    """Numbers of each tensor where pairs have so many components; `numel` counts those of the recipe's rank."""
    most = rank(plan)
    axes = component_axes(numel) if most else {}
    return {name: size // most * components if name in axes else size for name, size in numel.items()}


def numbers_down(plan: "Plan", numel: dict[str, int], ranks: float) -> dict[str, int]:
    """Numbers of each tensor in what a round of clients comes to whose ranks have this sum."""
    return numbers(plan, numel, max(1, round(ranks))) if "rank_sum" in plan.aggregation.gives else numel
