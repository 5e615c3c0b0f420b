"""Personal: tensors that a client trains for itself and never sends, and the model that it alone can make of them.

A parametrization that gives `personal` has them. They lie in the client's state between rounds; the model of the
federation is the one without them.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from kilotune.core.errors import RunError
from kilotune.core.types import State

if TYPE_CHECKING:
    from kilotune.engine.composing.plan import Plan
    from kilotune.engine.rounds.ledger import Ledger

PERSONAL = "personal"


def personal_clashes(plan: "Plan") -> list[str]:
    """What does not go with tensors that stay with a client."""
    kind, recipe = plan.parametrization, plan.recipe
    if PERSONAL not in kind.gives:
        return []
    name, problems = f"parametrization {kind.method_name()!r}", []
    if recipe.steps:
        problems.append(f"{name} is for rounds of several clients. Use parametrization: {{name: peft, method: lora}}.")
    if plan.uplink.cycle > 1 or recipe.streaming.overlap or recipe.streaming.mixing:
        problems.append(
            f"{name} starts each round from the shared adapter, but streaming goes on from a client's own weights. Use "
            "parametrization: peft, or an uplink without fragments and --set streaming.overlap=0 streaming.mixing=0."
        )
    return problems


def personal_tensors(folder: Path, plan: "Plan", ledger: "Ledger") -> State:
    """The tensors of a client's own after the last round of this ledger that it has answered.

    `folder` is the client's: RUN/clients/NAME, or the --output of its `kilotune client`. Raises RunError.
    """
    from kilotune.engine.rounds.clientstate import (
        ClientState,  # loads torch, for which composing a recipe does not wait
    )

    if PERSONAL not in plan.parametrization.gives:
        raise RunError(
            f"{folder}: parametrization {plan.parametrization.method_name()!r} trains nothing of a client's own. Leave "
            "out --personal."
        )
    state = ClientState(folder)
    for record in reversed(ledger.records):
        if state.answer(record.round, record.previous) is not None:
            return state.before(record.round + 1)[0].weights
    raise RunError(
        f"{folder}: holds no state of a client in this run. Give the folder of one, such as RUN/clients/NAME."
    )
