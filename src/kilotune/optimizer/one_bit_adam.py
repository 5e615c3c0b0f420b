"""1-bit Adam: x ← x + lr · m / (sqrt(v) + eps) on every replica, v frozen after `warmup` rounds.

While v is learned a round brings the mean change Δ: m ← beta1 · m + (1 - beta1) · Δ, v ← beta2 · v + (1 - beta2) · Δ².
From then on clients send beta1 · m + (1 - beta1) · Δ_i (optimizer: shared_momentum); the mean of these is the next m,
and they may go as signs: a codec `warmup` around `residual` around `sign`, up and down. What everybody hears is m, so
every replica takes the step itself. One local step of sgd with lr 1 gives the gradient of the paper.

Source: Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed", arXiv
2102.02888, algorithm 1. No bias correction of m, as in DeepSpeed's code.
Departs: the number of warm-up rounds is given; the paper also proposes to watch how much v still changes. When v is
frozen it is divided by 1 - beta2^warmup, which is 1 after the paper's thousands of rounds and 0.012 after twelve.
Memory: 8 bytes per number on every replica (16 for float64).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from kilotune.core.lazy import no_grad, torch
from kilotune.optimizer import State
from kilotune.optimizer._betas import Betas
from kilotune.optimizer._followed import Followed

if TYPE_CHECKING:
    from torch import Tensor


class OneBitAdam(Followed):
    """A step that all replicas take with what the server has heard."""

    needs = frozenset({"momentum"})

    betas: Betas = Field((0.9, 0.999), description="memory of m and v; paper")
    eps: float = Field(1e-8, gt=0, description="added to the root of v; paper")
    warmup: int = Field(3, ge=1, description="rounds in which v is learned; 15 to 20 % of the steps in the paper")

    @property
    def public_copies(self) -> int:
        """m and v."""
        return 2

    @no_grad
    def follow(self, change: Tensor, public: State) -> Tensor:
        """Public: `m`, `v`, `rounds` () int64, and `decay` () as soon as the clients send momentum."""
        if not public:
            public |= {"m": torch.zeros_like(change), "v": torch.zeros_like(change), "rounds": torch.tensor(0)}
        m, v, beta1 = public["m"], public["v"], self.betas[0]
        if int(public["rounds"].add_(1)) <= self.warmup:
            m.mul_(beta1).add_(change, alpha=1 - beta1)
            v.mul_(self.betas[1]).addcmul_(change, change, value=1 - self.betas[1])
        else:
            if int(public["rounds"]) == self.warmup + 1:
                v.div_(1 - self.betas[1] ** self.warmup)  # the mean of the squares
            m.copy_(change).masked_fill_(v == 0, 0)  # a sign cannot say 0, and what never had a gradient has no scale
        if int(public["rounds"]) == self.warmup:
            public["decay"] = torch.tensor(beta1, dtype=torch.float64)
        return torch.div(m, v.sqrt().add_(self.eps)).mul_(float(self.lr))


METHOD = OneBitAdam
