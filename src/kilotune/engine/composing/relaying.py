"""Relaying: what recipes need whose clients draw directions that others can draw, too, and add up one another's bytes.

A codec that is `sender_bound` sends numbers for directions that follow from round, sender and step. One that keeps
pairs `apart` lists them by sender, for everybody to add up.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kilotune.engine.composing.plan import Plan

GOOD = "uplink: one_byte, aggregation: relay and downlink: peers"


def relay_clashes(plan: "Plan") -> list[str]:
    """Parts that would have others draw other directions or come to another sum, each with a pair that works."""
    problems = _direction_clashes(plan) if "sender_bound" in plan.uplink.traits else []
    if "apart" in plan.uplink.traits:
        problems.append("uplink 'peers' lists what several clients sent. Use uplink: one_byte.")
    relays, lists = plan.aggregation.method_name() == "relay", "apart" in plan.downlink.traits
    if relays or lists:
        problems += _sum_clashes(plan, relays and lists)
    return problems


def _direction_clashes(plan: "Plan") -> list[str]:
    up, problems = plan.uplink.method_name(), []
    if plan.recipe.defences.enabled:
        problems.append(
            f"defences take equal payloads for copies, but with uplink {up!r} two clients may well send the same byte. "
            "Use --set defences.enabled=false, or uplink: seed_scalar."
        )
    if plan.optimizer.lr == "auto":
        problems.append(
            f"uplink {up!r} sends no directions: they are those of the steps alone, but optimizer.lr: auto draws more, "
            "to measure the curvature. Give a number, or use uplink: seed_scalar."
        )
    if getattr(plan.aggregation, "selection", "uniform") != "uniform":
        problems.append(
            f"uplink {up!r} sends no directions: they must be drawn alike in every round. Use selection: uniform, or "
            "uplink: seed_scalar."
        )
    return problems


def _sum_clashes(plan: "Plan", whole: bool) -> list[str]:
    up, down, rule, problems = plan.uplink, plan.downlink, plan.aggregation, []
    if not whole or "sender_bound" not in up.traits:
        problems.append(
            f"uplink {up.method_name()!r}, aggregation {rule.method_name()!r}, downlink {down.method_name()!r} do not "
            f"fit: what peers add up themselves takes all of {GOOD}. Use these, or aggregation: seed_sum with "
            "downlink: seed_scalar."
        )
    elif (ours := getattr(up, "unit", None)) != (theirs := getattr(down, "unit", None)):
        problems.append(f"downlink.unit: got {theirs}, expected {ours} as in the uplink. Use one number in both.")
    if rule.weighting != "equal":
        problems.append(
            f"downlink {down.method_name()!r} counts every peer alike, but aggregation.weighting is "
            f"{rule.weighting!r}. Use --set aggregation.weighting=equal."
        )
    if plan.server_optimizer.lr != 1.0:
        problems.append(
            f"server_optimizer.lr: got {plan.server_optimizer.lr}, but with downlink {down.method_name()!r} peers take "
            "their own bytes as they are. Use 1.0, and a larger or smaller optimizer.lr."
        )
    if plan.privacy is not None and plan.privacy.unit == "client":
        problems.append(
            f"privacy {plan.privacy.method_name()!r} hides updates in a sum, but downlink {down.method_name()!r} "
            "shows each. Use privacy: local, or aggregation: seed_sum with downlink: seed_scalar."
        )
    return problems
