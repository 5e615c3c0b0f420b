"""Privacy: what one unit (a client, or one example) can change is bounded, and noise of a known size hides the rest.

A release is Σ contribution + N(0, (noise_multiplier · clip)²) in every number, where a contribution's L2 norm is at
most `clip`. All of it is computed in whole steps of a public grid, 2^-20 of the noise: the sum is exact in any order,
and no low bits of a float tell what was added. The noise comes from the operating system's secrets, never from the
recipe's seed. How much a run has spent is the accountant's business (kilotune.engine.privacy.accountant).
"""

from abc import abstractmethod
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from kilotune.core.method import Method
from kilotune.privacy._secret import gaussians

__all__ = ["GRID", "Privacy"]

GRID = 2**20  # steps of the grid in one standard deviation of the noise


class Privacy(Method):
    """Contract. No values, not even infinite ones, give a contribution longer than `clip`."""

    unit: ClassVar[Literal["client", "example"]]

    clip: float = Field(gt=0, description="largest L2 norm of a contribution; docs/privacy.md says how to choose it")
    noise_multiplier: float | None = Field(
        None, ge=0.01, description="noise in units of clip; none: the least that keeps all rounds within epsilon"
    )
    epsilon: float | None = Field(None, gt=0, description="budget: the run ends before it is exceeded; none: no end")
    delta: float = Field(1e-5, gt=0, lt=1, description="probability left out; below 1 / number of units")

    @model_validator(mode="after")
    def _has_noise(self) -> Self:
        if self.noise_multiplier is None and self.epsilon is None:
            raise ValueError("an epsilon, a noise_multiplier, or both")
        return self

    @abstractmethod
    def contribution(self, values: np.ndarray, noise_multiplier: float) -> np.ndarray:
        """int64, same shape: the values clipped, in steps of the grid, rounded towards zero."""

    def step(self, noise_multiplier: float) -> float:
        """The grid's step."""
        return self.clip * noise_multiplier / GRID

    def release(self, total: np.ndarray, noise_multiplier: float, key: bytes | None = None) -> np.ndarray:
        """float64: a sum of contributions and the noise, in the values' own unit.

        `key` (32 bytes) is for tests; None: a fresh secret, used once and forgotten.
        """
        noise = np.rint(gaussians(total.size, key) * GRID).astype(np.int64).reshape(total.shape)
        return (total + noise) * self.step(noise_multiplier)
