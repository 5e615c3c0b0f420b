"""SGD: change = -lr · b, b = momentum · b + d, d = g + weight_decay · w; with nesterov -lr · (d + momentum · b).

Source: Robbins and Monro, "A Stochastic Approximation Method"; Polyak, "Some methods of speeding up the convergence
of iteration methods", for the momentum; Sutskever et al., "On the importance of initialization and momentum in deep
learning", ICML 2013, for Nesterov's; equal to torch.optim.SGD.
Memory: nothing without momentum, else 4 bytes per number (8 for float64 parameters); one temporary of the tensor's
size, which is the returned change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from kilotune.core.lazy import no_grad
from kilotune.optimizer import Optimizer, State
from kilotune.optimizer._memory import working_dtype, zeros_for

if TYPE_CHECKING:
    from torch import Tensor


class SGD(Optimizer):
    """Stochastic gradient descent with heavy-ball momentum and L2 decay."""

    momentum: float = Field(0.0, ge=0, lt=1, description="share of the last step that is kept; 0 keeps no state")
    nesterov: bool = Field(False, description="look ahead: the step is taken with the gradient and the next momentum")
    weight_decay: float = Field(0.0, ge=0, description="L2 penalty, added to the gradient")

    @model_validator(mode="after")
    def _looks_ahead_along_something(self) -> SGD:
        if self.nesterov and self.momentum == 0:
            raise ValueError("momentum above 0 with nesterov: true")
        return self

    @property
    def by_parts(self) -> bool:
        """Without momentum every number goes its own way."""
        return self.momentum == 0

    @property
    def copies(self) -> int:
        """The momentum, where there is one."""
        return int(self.momentum > 0)

    def init(self, param: Tensor) -> State:
        """`momentum`, zeros like the parameter, or nothing."""
        if self.momentum == 0:
            return {}
        return {"momentum": zeros_for(param)}

    @no_grad
    def update(self, gradient: Tensor, state: State, param: Tensor, lr: float) -> Tensor:
        """Reads nothing but its arguments; mutates only the state."""
        dtype = working_dtype(param)
        if self.momentum == 0:
            delta = gradient.to(dtype).mul(-lr)
            return delta.add_(param, alpha=-lr * self.weight_decay) if self.weight_decay else delta
        buffer = state["momentum"].mul_(self.momentum).add_(gradient)
        if self.weight_decay:
            buffer.add_(param, alpha=self.weight_decay)
        if not self.nesterov:
            return buffer.mul(-lr)
        delta = buffer.mul(-lr * self.momentum).add_(gradient, alpha=-lr)
        return delta.add_(param, alpha=-lr * self.weight_decay) if self.weight_decay else delta


METHOD = SGD
