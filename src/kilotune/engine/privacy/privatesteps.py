"""Private steps: a client's side of `privacy: local`.

Its steps use batches drawn in secret and one noisy slope each, and it keeps its own account.
"""

from pathlib import Path
from typing import Any, cast

import numpy as np

from kilotune.core.errors import FederationError
from kilotune.engine.composing.plan import Plan
from kilotune.engine.privacy.accountant import SPENDING, Accountant, Release, round_key, statement, with_noise
from kilotune.privacy import Privacy
from kilotune.privacy._secret import generator

__all__ = ["PrivateSteps", "private_steps"]


class PrivateSteps:
    """A client's side of `privacy: local`: its batches, its noisy slopes, its account."""

    def __init__(self, plan: Plan, path: Path, num_examples: int) -> None:
        self._privacy, self._num = cast(Privacy, plan.privacy), num_examples
        self._accountant = Accountant(path, self._privacy.delta, self._privacy.epsilon)
        self._batch = min(plan.recipe.batch_size, num_examples)
        self._steps = plan.recipe.most_local_steps
        release = Release(num_examples, self._batch, 1.0, replaces=True)
        self._release = with_noise(release, self._accountant, self._privacy, (plan.recipe.rounds or 1) * self._steps)

    def facts(self) -> dict[str, str | int | float]:
        """What the server is told: none of it depends on what the rows say."""
        left = self._accountant.affords(self._release, self._steps)
        return {"epsilon": self._accountant.epsilon(), "budget_left": left}

    def charge(self, client: str, number: int, head: str, steps: int) -> None:
        """Before a round's steps. Raises FederationError when they would go beyond the budget."""
        key = round_key(number, head)
        if not self._accountant.affords(self._release, steps, key):
            raise FederationError(
                f"client {client!r}: round {number} would spend more than its epsilon {self._accountant.budget:g} "
                f"(so far {self._accountant.epsilon():.3g}). It takes no further part."
            )
        self._accountant.charge(key, self._release, steps)

    def settle(self) -> None:
        """The round's answer is on disk and may be sent."""
        self._accountant.settle()

    def batch(self) -> list[int]:
        """A secret draw without replacement, on its own in each step."""
        chosen = generator().choice(self._num, size=self._batch, replace=False)
        return [int(i) for i in np.sort(chosen)]

    def slope(self, slopes: np.ndarray) -> float:
        """One number from the slopes of a batch's examples."""
        noise = self._release.noise_multiplier
        total = self._privacy.contribution(slopes, noise).sum(keepdims=True)
        return float(self._privacy.release(total, noise)[0]) / self._batch

    def summary(self) -> dict[str, Any]:
        return {**statement(self._privacy, self._accountant, self._release), "steps": self._accountant.count}


def private_steps(plan: Plan, folder: Path, num_examples: int) -> PrivateSteps | None:
    """What the recipe's `privacy` asks of a client."""
    if plan.privacy is None or plan.privacy.unit != "example" or not num_examples:
        return None
    return PrivateSteps(plan, folder / SPENDING, num_examples)
