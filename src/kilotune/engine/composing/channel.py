"""Channel: what recipes need whose clients send as much as their momentary channel carries.

A codec that is `channel_bound` leaves components out. That changes nothing else where a pair is a change of its own
(`fresh_start`) and rules take products of any rank. `directions`: what is trained are directions, not the pair itself.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kilotune.engine.composing.plan import Plan

BOUND = "channel_bound"


def channel_clashes(plan: "Plan") -> list[str]:
    """Parts that take what was left out for something else, each with a pair that works."""
    up, kind, rule = plan.uplink, plan.parametrization, plan.aggregation
    problems = []
    if "directions" in kind.gives and plan.recipe.arms.pruning:
        problems.append(
            f"arms: parametrization {kind.method_name()!r} trains directions, of which no unit can be left out. Use "
            "parametrization: lora_merged."
        )
    if BOUND in plan.downlink.traits:
        problems.append(
            f"downlink {plan.downlink.method_name()!r} cuts to a sender's channel what everybody has to apply. Use "
            "downlink: low_rank."
        )
    if BOUND not in up.traits:
        return problems
    if not up.needs <= kind.gives:
        problems.append(
            f"uplink {up.method_name()!r} leaves components out, which would be lost to what parametrization "
            f"{kind.method_name()!r} goes on from. Use parametrization: lora_svd, or uplink: dense."
        )
    if "equal_ranks" in rule.needs:
        problems.append(
            f"aggregation {rule.method_name()!r} needs clients of one rank, but with uplink {up.method_name()!r} the "
            "channel decides. Use aggregation: flex_lora."
        )
    return problems
