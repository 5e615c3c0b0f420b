"""Central, client-level: mean = (Σ_i x_i · min(1, C / ‖x_i‖) + N(0, (σC)² I)) / S, on the server.

Source: McMahan et al., "Learning Differentially Private Recurrent Language Models", arXiv 1710.06963, algorithm 1.
Departs: S is the planned cohort, whoever answers; its clients are drawn without replacement, not by Poisson sampling;
    x is what the client sent (coordinates, adapter, or one number per direction), clipped whole.
"""

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from kilotune.privacy import Privacy


class Central(Privacy):
    """The server is trusted with updates; nobody else learns whether a client took part, whatever it holds."""

    unit = "client"
    example: ClassVar[dict[str, Any]] = {"clip": 1.0, "noise_multiplier": 1.0, "clients": 4}

    clients: int = Field(ge=1, description="clients planned; a public number that never follows who is there")

    def contribution(self, values: np.ndarray, noise_multiplier: float) -> np.ndarray:
        """The vector scaled down to the norm `clip`; one that is not finite counts as nothing."""
        exact = np.asarray(values, dtype=np.float64)
        norm = float(np.linalg.norm(exact))
        if not np.isfinite(norm):
            return np.zeros(exact.shape, np.int64)
        factor = min(1.0, self.clip / norm) if norm else 1.0
        factor *= 1 - 2.0**-40  # so that rounding in norm and product cannot lead beyond clip
        return np.trunc(exact * factor / self.step(noise_multiplier)).astype(np.int64)


METHOD = Central
