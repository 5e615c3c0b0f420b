"""Choosers: what a parametrization that decides for every row by its prompt does not go with."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kilotune.engine.composing.plan import Plan

CHOOSER = "chooser"


def chooser_clashes(plan: "Plan") -> list[str]:
    """Parts that look at rows, or at the base that chooses for them, in another way."""
    kind, privacy = plan.parametrization, plan.privacy
    problems: list[str] = []
    if CHOOSER not in kind.gives:
        return problems
    name = f"parametrization {kind.method_name()!r}"
    if privacy is not None and privacy.unit == "example":
        problems.append(
            f"privacy {privacy.method_name()!r} hides single slopes, but {name} learns its choice from a term that is "
            "no example's loss. Use privacy: central, or parametrization: peft."
        )
    if plan.recipe.emulator.active:
        problems.append(
            f"emulator leaves clients part of the base, but {name} chooses by the last hidden states of all of it. "
            "Use parametrization: peft."
        )
    return problems
