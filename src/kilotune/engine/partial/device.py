"""Device: a client that follows the server's arms (see `arms`): what it leaves out in a round, and how it fares.

It remembers the units it has and what each was worth in the last round. What has gone does not come back, whatever is
asked of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from kilotune.core.errors import WireError
from kilotune.core.trainable import Trainable
from kilotune.core.types import State
from kilotune.engine.flower.messages import Facts
from kilotune.engine.partial import pruning
from kilotune.estimator import Objective
from kilotune.parametrization._pairs import PairsTrainable

if TYPE_CHECKING:
    from kilotune.engine.composing.plan import Plan

Work = Callable[[], Iterator[Objective]]


def ordered(plan: "Plan", asked: Facts) -> "Plan":
    """The plan with the rank that this round asks for. Raises WireError for an arm that the recipe does not have."""
    arms = plan.recipe.arms
    if not arms.pruning:
        return plan
    share, rank = asked.get("pruning"), asked.get("rank")
    if share not in arms.pruning or rank not in arms.ranks:
        raise WireError(
            f"asked for pruning {share} and rank {rank}, expected one of {list(arms.pruning)} and one of "
            f"{list(arms.ranks)}."
        )
    return replace(plan, parametrization=plan.parametrization.model_copy(update={"rank": int(rank)}))


class Device:
    """One client in one round. `remembered` is what it has kept of earlier rounds, and is left to later ones."""

    def __init__(
        self,
        plan: "Plan",
        trainable: Trainable,
        remembered: State,
        asked: Facts,
        work: Callable[[], Iterator[Objective]],
    ) -> None:
        """`work`: the round's objectives, of which the first is measured before and after. Without arms in the recipe
        nothing happens here."""
        self._trainable, self._remembered, self._work = trainable, remembered, work
        self._asked: Facts = {key: asked[key] for key in ("pruning", "rank")} if plan.recipe.arms.pruning else {}
        self._losses: Facts = {}

    @contextmanager
    def working(self) -> Iterator[None]:
        """Inside, the model is what this device has of it."""
        if not self._asked:
            yield
            return
        trainable, remembered = self._trainable, self._remembered
        assert isinstance(trainable, PairsTrainable)
        blocks = pruning.blocks_of(trainable.model)
        before = pruning.kept_before(blocks, remembered)
        with pruning.only(trainable, blocks, before):
            first = self._loss()
        kept = pruning.most_important(blocks, before, remembered, float(self._asked["pruning"]))
        with pruning.only(trainable, blocks, kept):
            yield
            self._losses = {"loss_first": first, "loss": self._loss()}
            for block in blocks:
                pruning.gradient_scores(block, trainable.params, kept[block.name], remembered)
        remembered |= {f"kept/{name}": units for name, units in kept.items()}

    def told(self, losses: Facts) -> Facts:
        """What the client tells of its round, `losses` being those of its first and last step."""
        return {**losses, **self._asked, **self._losses}

    def _loss(self) -> float:
        with torch.no_grad():
            return sum(float(part()) for part in next(self._work()).parts())
