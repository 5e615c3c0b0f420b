"""Capabilities: which parts of a recipe secure aggregation can work with, and why not with the others.

What can be summed under masks is a vector of the same length and meaning for every client, whose weighted sum is all
that the server needs. docs/secure_aggregation.md holds the table that `matrix` makes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kilotune.core.registry import find, names
from kilotune.engine.secure.fixed import LEAST_LEVELS, FixedPoint

if TYPE_CHECKING:
    from kilotune.engine.composing.plan import Plan

VECTORS = {"tensors": "every number of every tensor", "seeds": "one sum per direction"}
"""What a summable uplink takes -> what is summed in its place."""
SUMS = ("mean", "seed_sum")
"""Aggregations that need the weighted sum and nothing else."""
OFF = "or --set secure_aggregation.enabled=false"


def matrix() -> list[tuple[str, str, str]]:
    """(uplink, aggregation, what is summed or why nothing can be) of every pair; `any` where no rule can help."""
    rows = []
    for uplink in names("codec"):
        rules = names("aggregation") if _summable(uplink) else ["any"]
        rows += [(uplink, rule, verdict(uplink, rule)) for rule in rules]
    return rows


def verdict(uplink: str, rule: str) -> str:
    """One cell of the table."""
    if not _summable(uplink):
        return f"no: {_vectorless(uplink)}"
    sends, takes = find("codec", uplink).takes, find("aggregation", rule).takes
    if rule not in SUMS:
        return f"no: {_curious(rule)}"
    if sends != takes:
        return f"no: {rule} takes {takes}, with or without masks"
    return f"yes: {VECTORS[sends]}" + (", not `selection: amplitude`" if rule == "seed_sum" else "")


def secure_clashes(plan: Plan) -> list[str]:
    """Parts that need to see single updates, each with a pair that works."""
    if not plan.recipe.secure_aggregation.enabled:
        return []
    return [*_part_clashes(plan), *_section_clashes(plan)]


def grid_of(plan: Plan) -> FixedPoint:
    """How this recipe's clients make integers."""
    section = plan.recipe.secure_aggregation
    weight = 1 if plan.aggregation.weighting == "equal" else section.max_weight
    return FixedPoint(section.clip, section.bits, section.max_clients, weight, section.rounding)


def length(plan: Plan, numel: dict[str, int]) -> int:
    """Numbers of an update: a sum per direction, or all of its tensors'."""
    return plan.num_directions if plan.uplink.takes == "seeds" else sum(numel.values())


def _summable(uplink: str) -> bool:
    return "summable" in find("codec", uplink).gives


def _vectorless(uplink: str) -> str:
    gives = find("codec", uplink).gives
    if "own_support" in gives:
        return "every client chooses what it sends, so there is no vector of one meaning to sum"
    if "any_rank" in gives:
        return "ranks differ between clients, so there is no vector of one length to sum"
    return "its encoding is the method, and masked integers would replace it"


def _curious(rule: str) -> str:
    if not find("aggregation", rule).linear:
        return "it compares single updates, which secure aggregation hides"
    return "it is not known to need the sum alone"


def _part_clashes(plan: Plan) -> list[str]:
    uplink, rule, problems = plan.uplink.method_name(), plan.aggregation.method_name(), []
    if not _summable(uplink):
        problems.append(
            f"secure_aggregation cannot mask uplink {uplink!r}: {_vectorless(uplink)}. Use uplink: coefficients with "
            f"parametrization: subspace, {OFF}."
        )
    if rule not in SUMS:
        good = "seed_sum" if plan.uplink.takes == "seeds" else "mean"
        problems.append(
            f"secure_aggregation hides what aggregation {rule!r} needs: {_curious(rule)}. "
            f"Use aggregation: {good}, {OFF}."
        )
    if getattr(plan.aggregation, "selection", "uniform") != "uniform":
        problems.append(
            "secure_aggregation hides the single scalars that aggregation.selection: amplitude learns from. "
            f"Use aggregation: {{name: {rule}, selection: uniform}}, {OFF}."
        )
    if plan.privacy is not None and plan.privacy.unit == "client":
        problems.append(
            f"secure_aggregation hides the single updates that privacy {plan.privacy.method_name()!r} clips on the "
            f"server. Use privacy: local, {OFF}."
        )
    return problems


def _section_clashes(plan: Plan) -> list[str]:
    recipe, problems = plan.recipe, []
    section = recipe.secure_aggregation
    if recipe.defences.enabled:
        problems.append(
            "secure_aggregation hides the single updates that defences judge; clients cut their own numbers to "
            f"secure_aggregation.clip instead. Use --set defences.enabled=false, {OFF}."
        )
    if recipe.keep_contributions == "always":
        problems.append(
            "secure_aggregation leaves no contribution to keep: what clients send is noise without the others'. "
            f"Use keep_contributions: never, {OFF}."
        )
    per_round = getattr(plan.schedule, "clients_per_round", None)
    if per_round is not None and not 2 <= per_round <= section.max_clients:
        problems.append(
            f"schedule.clients_per_round: got {per_round}, expected 2 to secure_aggregation.max_clients "
            f"({section.max_clients}): the sum of one is no secret, and that of more could wrap around."
        )
    grid = grid_of(plan)
    if grid.levels < LEAST_LEVELS:
        problems.append(
            f"secure_aggregation.bits: {grid.bits} bits for the sum of {grid.max_clients} clients of weight up to "
            f"{grid.max_weight} leave {grid.levels} levels for a number, expected at least {LEAST_LEVELS}. Use "
            "--set aggregation.weighting=equal, a smaller max_clients or max_weight, or bits: 32."
        )
    return problems
