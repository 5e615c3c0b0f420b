"""AdamW: change = -lr · (m̂ / (sqrt(v̂) + eps) + weight_decay · w), m̂ and v̂ bias-corrected moving means of g and g².

Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101; Kingma and Ba, "Adam: A
Method for Stochastic Optimization", arXiv 1412.6980; equal to torch.optim.AdamW.
Departs: weight decay is 0 unless asked for, because a change of frozen-base coordinates must not decay by default.
Memory: 8 bytes per number and 8 for the step count (16 and 8 for float64 parameters); one temporary of the tensor's
size, which is the returned change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from kilotune.core.lazy import no_grad, torch
from kilotune.optimizer import Optimizer, State
from kilotune.optimizer._betas import Betas
from kilotune.optimizer._memory import zeros_for

if TYPE_CHECKING:
    from torch import Tensor


class AdamW(Optimizer):
    """Adam with decoupled weight decay."""

    betas: Betas = Field((0.9, 0.999), description="memory of the two moving means; Adam paper")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment; Adam paper")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay, multiplied by the learning rate")

    @property
    def copies(self) -> int:
        """m and v."""
        return 2

    def init(self, param: Tensor) -> State:
        """`m` and `v` like the parameter in float32 (float64 for float64), `step` () int64."""
        return {"m": zeros_for(param), "v": zeros_for(param), "step": torch.zeros((), dtype=torch.int64)}

    @no_grad
    def update(self, gradient: Tensor, state: State, param: Tensor, lr: float) -> Tensor:
        """Reads nothing but its arguments; mutates only the state."""
        m, v, step = state["m"], state["v"], state["step"].add_(1)
        g = gradient.to(m.dtype)
        m.mul_(self.betas[0]).add_(g, alpha=1 - self.betas[0])
        v.mul_(self.betas[1]).addcmul_(g, g, value=1 - self.betas[1])
        correction1 = 1 - self.betas[0] ** int(step)
        correction2 = 1 - self.betas[1] ** int(step)
        delta = v.sqrt().div_(correction2**0.5).add_(self.eps)
        torch.div(m, delta, out=delta).mul_(-lr / correction1)
        return delta.add_(param, alpha=-lr * self.weight_decay) if self.weight_decay else delta


METHOD = AdamW
