"""Multi-Krum: the mean of the n - f updates with the smallest score, score = Σ of the n - f - 2 smallest ‖x_i - x_j‖².

Source: Blanchard, El Mhamdi, Guerraoui and Stainer, "Machine Learning with Adversaries: Byzantine Tolerant Gradient
Descent", NeurIPS 2017, sections 4 and 6.
Departs: those chosen keep their weights, divided by their sum; f follows from a fraction of the clients and is lowered
to what n allows (n >= 2f + 3), so that fewer than five clients are a plain mean; ties are broken by content.
Memory: all updates of a round at once.
"""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field

from kilotune.aggregation._robust import Choosing


class MultiKrum(Choosing):
    """Leaves out the updates that lie far from their nearest others."""

    malicious_frac: float = Field(0.2, ge=0, lt=0.5, description="f / n, clients that may lie, rounded up")

    def num_malicious(self, num_clients: int) -> int:
        """f of the paper."""
        return max(0, min(math.ceil(self.malicious_frac * num_clients - 1e-9), (num_clients - 3) // 2))

    def votes(self, squares: np.ndarray, weights: np.ndarray) -> np.ndarray:
        num_clients = len(weights)
        malicious = self.num_malicious(num_clients)
        if malicious == 0:
            return weights
        nearest = np.sort(squares, axis=1)[:, 1 : num_clients - malicious - 1]  # column 0 is the update itself
        chosen = np.argsort(nearest.sum(axis=1), kind="stable")[: num_clients - malicious]
        votes = np.zeros(num_clients)
        votes[chosen] = weights[chosen] / weights[chosen].sum()
        return votes


METHOD = MultiKrum
