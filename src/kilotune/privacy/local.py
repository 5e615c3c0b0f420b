"""Local, example-level: one noisy scalar a step, p = (Σ_i clip(p_i, ±C) + N(0, (σC)²)) / B, on the client.

p_i = (ℓ_i(θ + εz) − ℓ_i(θ − εz)) / 2ε is one example's slope along a public direction z.

Source: Tang et al., "Private Fine-tuning of Large Language Models with Zeroth-order Optimization", arXiv 2401.04343
    (DP-ZO); Zhang et al., "DPZero: Private Fine-Tuning of Language Models without Backpropagation", arXiv 2310.09639.
Departs: a batch is B examples drawn without replacement, anew in each step and in secret; ℓ_i is the mean over the
    example's own answer tokens, so that no example weighs more for being long.
"""

from typing import Any, ClassVar

import numpy as np

from kilotune.privacy import Privacy


class Local(Privacy):
    """Nobody but the client sees an example's slope; the noise on a step is one number, whatever the model's size."""

    unit = "example"
    example: ClassVar[dict[str, Any]] = {"clip": 1.0, "noise_multiplier": 1.0}

    def contribution(self, values: np.ndarray, noise_multiplier: float) -> np.ndarray:
        """Each example's slope clipped by itself; one without a slope counts as nothing."""
        slopes = np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0.0)
        clipped = np.clip(slopes, -self.clip, self.clip)
        return np.trunc(clipped / self.step(noise_multiplier)).astype(np.int64)


METHOD = Local
