"""Adaptive: x + lr · m / (sqrt(v) + tau) with moving means m of the rounds' changes and v of their squares.

Source: Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295, algorithm 2: FedAdam, FedYogi and FedAdagrad
differ in v alone. No bias correction; v starts at tau², the least the paper allows.
    adam:    v ← beta2 · v + (1 - beta2) · Δ²
    yogi:    v ← v - (1 - beta2) · Δ² · sign(v - Δ²)
    adagrad: v ← v + Δ²
Memory: 8 bytes per number (16 for float64 parameters).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kilotune.core.lazy import no_grad, torch
from kilotune.optimizer import Optimizer, State
from kilotune.optimizer._betas import Betas
from kilotune.optimizer._memory import zeros_for

if TYPE_CHECKING:
    from torch import Tensor


class Adaptive(Optimizer):
    """The server rules of the FedOpt family."""

    variance: Literal["adam", "yogi", "adagrad"] = Field("adam", description="how v follows the squares")
    betas: Betas = Field((0.9, 0.99), description="memory of m and of v (not adagrad's); paper, section 5")
    tau: float = Field(1e-3, gt=0, description="degree of adaptivity, added to the root of v; paper, section 5")

    @property
    def copies(self) -> int:
        """m and v."""
        return 2

    def init(self, param: Tensor) -> State:
        """`m` zeros and `v` tau², like the parameter in float32 (float64 for float64)."""
        zeros = zeros_for(param)
        return {"m": zeros, "v": torch.full_like(zeros, self.tau**2)}

    @no_grad
    def update(self, gradient: Tensor, state: State, param: Tensor, lr: float) -> Tensor:
        """Reads nothing but its arguments; mutates only the state. The gradient is minus the round's change."""
        m, v = state["m"], state["v"]
        g = gradient.to(m.dtype)
        m.mul_(self.betas[0]).add_(g, alpha=1 - self.betas[0])
        square = g.square()
        if self.variance == "adam":
            v.mul_(self.betas[1]).add_(square, alpha=1 - self.betas[1])
        elif self.variance == "yogi":
            v.sub_(square.mul((v - square).sign_()), alpha=1 - self.betas[1])
        else:
            v.add_(square)
        return torch.div(m, v.sqrt().add_(self.tau)).mul_(-lr)


METHOD = Adaptive
