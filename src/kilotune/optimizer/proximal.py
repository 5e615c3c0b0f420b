"""Proximal: the gradient of f(w) + mu/2 · ‖w - w_start‖², w_start the weights at the round's start, inside any rule.

Source: Li et al., "Federated Optimization in Heterogeneous Networks" (FedProx), arXiv 1812.06127, equation 2.
Departs: every client takes the same number of steps; the paper also lets slow ones stop early (inexact solutions).
Memory: the rule's own, and one copy of the tensor during a round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from kilotune.core.lazy import no_grad, torch
from kilotune.optimizer import State
from kilotune.optimizer._memory import working_dtype
from kilotune.optimizer._wrapped import Wrapped

if TYPE_CHECKING:
    from torch import Tensor

START = "start"


class Proximal(Wrapped):
    """Local steps held back towards where the round began."""

    gives = frozenset({"round_start"})

    mu: float = Field(0.01, ge=0, description="strength of the pull; the paper tries 0.001, 0.01, 0.1 and 1")

    @property
    def copies(self) -> int:
        """The rule's own, and the start."""
        return self.rule.copies + 1

    def init(self, param: Tensor) -> State:
        """The rule's state, and `start`, where the parameter is now."""
        return {**self.inner_init(param), START: param.detach().to(working_dtype(param), copy=True)}

    def begin(self, param: Tensor, state: State, public: State, steps: int) -> None:
        state[START] = param.detach().to(working_dtype(param), copy=True)

    @no_grad
    def update(self, gradient: Tensor, state: State, param: Tensor, lr: float) -> Tensor:
        """Reads nothing but its arguments; mutates only the state."""
        pulled = torch.sub(param, state[START]).mul_(self.mu).add_(gradient)
        return self.inner_update(pulled, state, param, lr)

    def carried(self, state: State) -> State:
        """All but where this round began."""
        return {key: value for key, value in state.items() if key != START}


METHOD = Proximal
