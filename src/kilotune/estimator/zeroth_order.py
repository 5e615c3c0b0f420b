"""Zeroth order, two-point: p = (L(θ + εz) − L(θ − εz)) / 2ε, gradient estimate p·z, from forward passes only.

Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", arXiv 2305.17333, algorithm 1 (MeZO);
    Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation" (1992).
Departs: the stored weights are never perturbed (each layer's forward sees w + εz in a scratch buffer), so nothing has
    to be restored; the learning rate can be measured (`optimizer.lr: auto`): 0.1 / tr H, with
    tr H ≈ (L₊ + L₋ − 2 L₀)/ε² averaged over probes, measured anew every `probe_every` steps.
Memory: inference plus one scratch tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from kilotune.core.lazy import no_grad, torch
from kilotune.core.trainable import Direction
from kilotune.estimator import Estimate, Estimator, Objective, Sink, State, Trainable

if TYPE_CHECKING:
    from torch import Tensor

SAFETY = 0.1  # of the largest stable rate 2/tr H this is one twentieth: slopes of single batches are noisy
NUM_PROBES = 5


class ZerothOrder(Estimator):
    gives = frozenset({"seed_log", "curvature", "example_slopes"})
    forward_only: ClassVar[bool] = True

    epsilon: float = Field(1e-3, gt=0, description="size of the probe, in units of the basis' scale; MeZO: 1e-3")
    clip: float | None = Field(
        None, gt=0, description="limit |p| to this many times its running rms (3 is a good value); none: no limit"
    )
    probe_every: int = Field(20, ge=1, description="steps between measurements of the curvature (optimizer.lr: auto)")

    def estimate(
        self, objective: Objective, trainable: Trainable, rng: np.random.Generator, state: State, sink: Sink
    ) -> Estimate:
        step = int(state["step"]) if "step" in state else 0
        if step % self.probe_every == 0 and "measure" in state:
            self._measure(objective, trainable, rng, state)
        direction = trainable.draw(rng)
        loss, slope = self._look(objective, trainable, direction)
        state["step"] = torch.tensor(step + 1)
        if not math.isfinite(slope):
            return Estimate(loss)  # a step without a finite slope moves nothing
        slope = float(np.float32(self._limited(slope, state)))
        trainable.slope(direction, slope, sink)
        return Estimate(loss, direction.index, slope)

    def suggested_lr(self, state: State) -> float | None:
        """SAFETY / tr H; asking for it (even before the first step) switches the measurement on."""
        state.setdefault("measure", torch.tensor(1))
        return SAFETY / float(state["trace"]) if "trace" in state else None

    @no_grad
    def _both(self, objective: Objective, trainable: Trainable, direction: Direction) -> tuple[float, float]:
        return trainable.both(direction, self.epsilon, objective.parts())

    def _look(self, objective: Objective, trainable: Trainable, direction: Direction) -> tuple[float, float]:
        """(loss, slope) along a direction; no loss where single examples are hidden."""
        if objective.release is not None:
            return math.nan, objective.release(self._slopes(objective, trainable, direction))
        plus, minus = self._both(objective, trainable, direction)
        slope = (plus - minus) / (2 * self.epsilon)
        return (plus + minus) / 2 if math.isfinite(slope) else plus, slope

    @no_grad
    def _slopes(self, objective: Objective, trainable: Trainable, direction: Direction) -> np.ndarray:
        """(n,) float64: every example's own slope."""
        slopes = []
        for part in objective.examples():
            seen: list[Tensor] = []  # one part at a time is looked at from the plus side, then from the other
            trainable.both(direction, self.epsilon, [partial(_noted, part, seen)])
            plus, minus = seen
            slopes.append((plus - minus).double() / (2 * self.epsilon))
        return torch.cat(slopes).numpy()

    def _measure(self, objective: Objective, trainable: Trainable, rng: np.random.Generator, state: State) -> None:
        with torch.no_grad(), trainable.perturbed(None, 0.0):
            here = sum(float(part()) for part in objective.parts())
        traces, slopes = [], []
        for _ in range(NUM_PROBES):
            direction = trainable.draw(rng)
            plus, minus = self._both(objective, trainable, direction)
            traces.append((plus + minus - 2 * here) / self.epsilon**2)
            slopes.append((plus - minus) / (2 * self.epsilon))
        # A loss that is locally flat or concave gives a tiny or negative trace; the squared slope bounds it below,
        # because a step of the whole slope must not promise more than the loss itself.
        floor = float(np.mean(np.square(slopes))) / max(abs(here), 1e-3)
        trace = max(float(np.mean(traces)), floor, 1e-6)
        if "trace" in state:
            trace = 0.5 * float(state["trace"]) + 0.5 * trace
        state["trace"] = torch.tensor(trace, dtype=torch.float64)

    def _limited(self, slope: float, state: State) -> float:
        if self.clip is None:
            return slope
        square = float(state["square"]) if "square" in state else slope * slope
        bound = self.clip * math.sqrt(square)
        limited = max(-bound, min(bound, slope))
        state["square"] = torch.tensor(0.9 * square + 0.1 * limited * limited, dtype=torch.float64)
        return limited


def _noted(part: Callable[[], Tensor], seen: list[Tensor]) -> Tensor:
    seen.append(part())
    return seen[-1].sum()


METHOD = ZerothOrder
