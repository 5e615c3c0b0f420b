"""Geometric median: v = argmin Σ p_i ‖v - x_i‖ by steps v ← Σ β_i x_i / Σ β_i, β_i = p_i / max(ν, ‖v - x_i‖).

Source: Pillutla, Kakade and Harchaoui, "Robust Aggregation for Federated Learning" (RFA, smoothed Weiszfeld),
arXiv 1912.13445, algorithm 2.
Departs: v is a weighted mean of the updates at every step, so the steps need only their distances and the updates are
added up once; ν is relative to the median distance to the nearest other update; steps go on until the weights
stand (the paper takes three).
Memory: all updates of a round at once.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from kilotune.aggregation._robust import Choosing

STEPS = 200  # at most; some ten are usual
STILL = 1e-12  # largest change of a weight that ends them


class GeometricMedian(Choosing):
    """As close to all updates as a point can be; half of the weight must lie to move it far."""

    smoothing: float = Field(1e-6, gt=0, description="ν, in median distances to the nearest update; RFA: 1e-6")

    def votes(self, squares: np.ndarray, weights: np.ndarray) -> np.ndarray:
        if not squares.any():
            return weights
        nearest = np.where(squares > 0, squares, np.inf).min(axis=1)  # of each to another; half of them are honest
        least = self.smoothing * float(np.sqrt(np.median(nearest)))
        votes = weights
        for _ in range(STEPS):
            pulls = squares @ votes
            gaps = np.sqrt(np.maximum(pulls - 0.5 * float(votes @ pulls), 0.0))  # ‖v - x_i‖, v = Σ votes_j x_j
            scaled = weights / np.maximum(gaps, least)
            before, votes = votes, scaled / scaled.sum()
            if np.abs(votes - before).max() < STILL:
                break
        return votes


METHOD = GeometricMedian
