"""Values: what recipes need whose updates hold tensors as they are, not how far they moved.

A parametrization that gives `values` takes over what a round came to, so nothing may scale, clip or thin it as if it
were a change from zero. A codec that gives `values` sends every number, or the nearest it has for it.
"""

from typing import TYPE_CHECKING

from kilotune.engine.composing.pairs import PAIR
from kilotune.engine.composing.recipe import CODECS

if TYPE_CHECKING:
    from kilotune.engine.composing.plan import Plan

WORD = "values"


def value_clashes(plan: "Plan") -> list[str]:
    """Parts that take tensors for changes, each with a pair that works."""
    if WORD not in plan.parametrization.gives or plan.recipe.steps:
        return []
    kind, local, outer = plan.parametrization.method_name(), plan.optimizer, plan.server_optimizer
    problems = []
    for way in CODECS:
        codec = getattr(plan, way)
        if WORD not in codec.gives:
            problems.append(
                f"{way} {codec.method_name()!r} is for changes, but parametrization {kind!r} sends tensors that are no "
                f"small changes. Use {way}: {'low_rank' if PAIR in plan.parametrization.gives else 'dense'}."
            )
    if not outer.by_parts or outer.lr != 1.0:
        problems.append(
            f"server_optimizer {outer.method_name()!r} of lr {outer.lr} would scale the tensors that parametrization "
            f"{kind!r} sends whole. Use server_optimizer: {{name: sgd, lr: 1.0, momentum: 0}}."
        )
    if local.gives:
        problems.append(
            f"optimizer {local.method_name()!r} sends more than where training ended, but parametrization {kind!r} is "
            "sent whole tensors. Use optimizer: adamw."
        )
    if plan.recipe.streaming.overlap or plan.recipe.streaming.mixing:
        problems.append(
            f"streaming mixes weights of two rounds, but parametrization {kind!r} is sent whole tensors. "
            "Use --set streaming.overlap=0 and streaming.mixing=0, or parametrization: full."
        )
    if plan.recipe.defences.enabled and plan.recipe.defences.gate is not None:
        problems.append(
            f"defences.gate tries a round as a change of what is trained, but parametrization {kind!r} is sent whole "
            "tensors. Use --set defences.gate=null."
        )
    if plan.privacy is not None:
        problems.append(
            f"privacy {plan.privacy.method_name()!r} bounds how far a client moves things, but parametrization "
            f"{kind!r} sends whole tensors. Use parametrization: lora_sb, or subspace."
        )
    return problems
