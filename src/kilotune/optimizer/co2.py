"""CO2: x ← x - lr · m, m ← clip(beta · m + g / gap), g minus the mean change of the round before this one.

So what a round brings is known before its clients answer, and answers can travel while the next round computes.
gap = 1 + ‖x - x_before‖ / (mean length of a step so far), both of this tensor: how far the weights have gone from where
g was measured. It is 1 where nothing moved.

Source: Sun et al., "CO2: Efficient Distributed Training with Full Communication-Computation Overlap", arXiv 2401.16265.
Departs: the published code holds the gap at a constant and drops the clipped momentum; the gap here is that of Barkai,
Hakimi and Schuster, "Gap Aware Mitigation of Gradient Staleness", arXiv 1909.10802, per tensor. The engine still waits
for a round's answers before it sends the next round's requests.
Memory: 8 bytes per number and 16 for lengths (16 and 16 for float64 parameters).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from kilotune.core.lazy import no_grad, torch
from kilotune.optimizer import Optimizer, State
from kilotune.optimizer._memory import zeros_for

if TYPE_CHECKING:
    from torch import Tensor


class CO2(Optimizer):
    """A server's momentum over means that are one round late."""

    needs = frozenset({"rounds"})

    momentum: float = Field(0.5, ge=0, lt=1, description="share of the last step that is kept; published code")
    threshold: float = Field(1.0, gt=0, description="largest |number| of the momentum; published code")
    penalty: bool = Field(True, description="divide by the gap; false: take late means as they are")
    late: bool = Field(True, description="step with the round before; false: with this one, as when waiting for it")

    @property
    def copies(self) -> int:
        """The momentum and the round that waits."""
        return 2

    def init(self, param: Tensor) -> State:
        """`momentum` and `waiting` zeros like the parameter; `moved`, `total` and `steps` () float64."""
        zeros = zeros_for(param)
        lengths = {key: torch.zeros((), dtype=torch.float64) for key in ("moved", "total", "steps")}
        return {"momentum": zeros, "waiting": zeros.clone(), **lengths}

    @no_grad
    def update(self, gradient: Tensor, state: State, param: Tensor, lr: float) -> Tensor:
        """Reads nothing but its arguments; mutates only the state."""
        momentum, waiting = state["momentum"], state["waiting"]
        momentum.mul_(self.momentum).add_(waiting if self.late else gradient, alpha=1 / self._gap(state))
        momentum.clamp_(-self.threshold, self.threshold)
        waiting.copy_(gradient)
        delta = momentum.mul(-lr)
        _note(delta, state)
        return delta

    def _gap(self, state: State) -> float:
        """At least 1; there is none without a step so far, nor when nobody is late."""
        if not (self.penalty and self.late) or float(state["total"]) == 0:
            return 1.0
        return 1.0 + float(state["moved"]) * float(state["steps"]) / float(state["total"])


def _note(delta: Tensor, state: State) -> None:
    """The length of a step. Summed in NumPy's fixed order, so that no number of threads changes a bit."""
    length = float((delta.detach().cpu().double().numpy() ** 2).sum()) ** 0.5
    state["moved"].fill_(length)
    if length > 0:
        state["total"].add_(length)
        state["steps"].add_(1)


METHOD = CO2
