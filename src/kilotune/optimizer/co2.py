"""CO2: x ← x + lr · m, m ← clip(beta · m + g / gap), g the mean change of the round before this one.

So what a round changes is known before its clients answer. Everybody hears the means and takes the steps, and a client
that has answered goes on with its next round at once, while the answers travel: a round takes as long as the steps or
as the way there and back, whichever is longer.
gap = 1 + ‖x - x_before‖ / (mean length of a step so far), both of this tensor: how far the weights have gone from where
g was measured. It is 1 where nothing moved.

Source: Sun et al., "CO2: Efficient Distributed Training with Full Communication-Computation Overlap", arXiv 2401.16265.
Departs: the published code holds the gap at a constant and drops the clipped momentum; the gap here is that of Barkai,
Hakimi and Schuster, "Gap Aware Mitigation of Gradient Staleness", arXiv 1909.10802, per tensor. The last round's mean
is heard, but no step is taken with it.
Memory: 8 bytes per number on every replica (16 for float64), and 24 bytes a tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from kilotune.core.lazy import no_grad, torch
from kilotune.optimizer import State
from kilotune.optimizer._followed import Followed

if TYPE_CHECKING:
    from torch import Tensor


class CO2(Followed):
    """Momentum over means that are one round late."""

    needs = frozenset({"rounds"})

    momentum: float = Field(0.5, ge=0, lt=1, description="share of the last step that is kept; published code")
    threshold: float = Field(1.0, gt=0, description="largest |number| of the momentum; published code")
    penalty: bool = Field(True, description="divide by the gap; false: take late means as they are")
    late: bool = Field(True, description="step with the round before; false: with this one, as when waiting for it")

    @property
    def public_copies(self) -> int:
        """The momentum and the round that waits."""
        return 2

    @property
    def foresees(self) -> bool:
        """Not where a round's own mean is waited for."""
        return self.late

    @no_grad
    def follow(self, change: Tensor, public: State) -> Tensor:
        """Public: `momentum` and `waiting` like the change; `moved`, `total` and `steps` () float64."""
        if not public:
            lengths = {key: torch.zeros((), dtype=torch.float64) for key in ("moved", "total", "steps")}
            public |= {"momentum": torch.zeros_like(change), "waiting": torch.zeros_like(change), **lengths}
        public["momentum"] = self._momentum(public["waiting"] if self.late else change, public)
        public["waiting"] = change.clone()
        delta = public["momentum"].mul(float(self.lr))
        _note(delta, public)
        return delta

    @no_grad
    def foresee(self, public: State) -> Tensor | None:
        """The step with the round that waits."""
        return self._momentum(public["waiting"], public).mul_(float(self.lr)) if self.late and public else None

    def _momentum(self, mean: Tensor, public: State) -> Tensor:
        """The momentum after one more mean; what is public stays."""
        moved = public["momentum"].mul(self.momentum).add_(mean, alpha=1 / self._gap(public))
        return moved.clamp_(-self.threshold, self.threshold)

    def _gap(self, public: State) -> float:
        """At least 1; there is none without a step so far, nor when nobody is late."""
        if not (self.penalty and self.late) or float(public["total"]) == 0:
            return 1.0
        return 1.0 + float(public["moved"]) * float(public["steps"]) / float(public["total"])


def _note(delta: Tensor, public: State) -> None:
    """The length of a step. Summed in NumPy's fixed order, so that no number of threads changes a bit."""
    length = float((delta.detach().cpu().double().numpy() ** 2).sum()) ** 0.5
    public["moved"].fill_(length)
    if length > 0:
        public["total"].add_(length)
        public["steps"].add_(1)


METHOD = CO2
