"""Streaming: clients that go on from their own weights, of which a round replaces only what has travelled.

Where not every tensor travels in every round, or a result is taken late or in part, a client keeps its own weights
from round to round. What it sends of a tensor is the way from the last common state to its own weights.

Source: Douillard et al., "Streaming DiLoCo with overlapping communication: Towards a Distributed Free Lunch", arXiv
2501.18512: fragments, results that land some steps late, and mixing with the weights a client has reached meanwhile.
Departs: only clients on machines of their own take the first `overlap` steps while a result travels (`ahead`), and only
where all take part in every round. A client sends when its round is over, not in the middle of it, so the rest of its
steps overlap with nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from kilotune.core.lazy import torch
from kilotune.core.trainable import Trainable
from kilotune.core.types import State

if TYPE_CHECKING:
    from torch import Tensor

    from kilotune.engine.composing.plan import Plan

ROUND = "/round"  # no tensor has this name


def streams(plan: Plan) -> bool:
    """Whether the clients of this plan go on from their own weights."""
    settings = plan.recipe.streaming
    return plan.uplink.cycle > 1 or settings.overlap > 0 or settings.mixing > 0


class OwnWeights:
    """One client's weights through one round. `kept` is what the last round has left, and is left to the next."""

    def __init__(self, plan: Plan, trainable: Trainable, kept: State, number: int) -> None:
        self._plan, self._trainable, self._kept, self._number = plan, trainable, kept, number
        self._settings = plan.recipe.streaming
        self._active = streams(plan)
        last = int(kept[ROUND]) if ROUND in kept else number
        self._landing = self._travelled(range(last, number))

    def _travelled(self, rounds: Iterable[int]) -> set[str]:
        names = list(self._trainable.wire)
        return {name for number in rounds for name in self._plan.downlink.travels(names, number)}

    def resume(self, ahead: State) -> None:
        """From the common state, where the round begins, to the client's own weights: those that steps taken `ahead`
        have led to, which are taken out of there, or those it kept."""
        for name, value in self._trainable.wire.items():
            lands = name in self._landing and self._settings.overlap == 0
            if name in ahead:
                self._place(name, ahead.pop(name))
            elif name in self._kept and not lands:
                self._place(name, self._kept[name])
            elif name in self._kept and self._settings.mixing:
                self._trainable.move(name, (self._kept[name] - value) * self._settings.mixing)

    def _place(self, name: str, value: Tensor) -> None:
        """Whatever the common state is, to the same bits, which a move by the difference would miss."""
        self._trainable.move(name, -self._trainable.wire[name])
        self._trainable.move(name, value)

    def before_step(self, step: int) -> None:
        """Take what the rounds since the last one have brought, once so many steps are done."""
        if step != self._settings.overlap or step == 0 or not self._landing:
            return
        ahead = self._trainable.update().tensors
        for name in sorted(self._landing):
            self._trainable.move(name, ahead[name] * (self._settings.mixing - 1))

    def keep(self) -> None:
        """Remember where the client stands."""
        if self._active:
            self._kept |= {name: value.clone() for name, value in self._trainable.wire.items()}
            self._kept[ROUND] = torch.tensor(self._number)


def streaming_clashes(plan: Plan) -> list[str]:
    """What clients with weights of their own do not go with."""
    recipe, problems = plan.recipe, []
    if plan.uplink.cycle != plan.downlink.cycle:
        problems.append(
            f"uplink {plan.uplink.method_name()!r} sends all tensors within {plan.uplink.cycle} rounds, downlink "
            f"{plan.downlink.method_name()!r} within {plan.downlink.cycle}. Use fragments with one count for both."
        )
    if not streams(plan):
        return problems
    if recipe.streaming.overlap >= recipe.local_steps:
        problems.append(
            f"streaming.overlap: got {recipe.streaming.overlap}, expected less than local_steps ({recipe.local_steps})."
        )
    return problems + [f"streaming {why}" for why in unsteady(plan)]


def unsteady(plan: Plan) -> list[str]:
    """Why a client of this plan cannot leave its tensors between two steps and come back to the same bits."""
    recipe = plan.recipe
    faults = {
        "needs tensors that stay what they are. Use parametrization: full or peft.": (
            plan.parametrization.uses_basis or "fresh_start" in plan.parametrization.gives
        ),
        "needs a client's tensors, which forward-only steps do not keep. Use estimator: backprop.": (
            plan.estimator.forward_only
        ),
        "sends a round's share of the tensors. Use it without secure_aggregation and privacy.": (
            recipe.secure_aggregation.enabled or plan.privacy is not None
        ),
        "has other tensors in other rounds. Use --set staleness.max=0.": recipe.staleness.max > 0,
        "leaves no change of one round to control. Use optimizer: adamw with server_optimizer: sgd.": (
            plan.optimizer.hears
        ),
    }
    return [why for why, applies in faults.items() if applies]
