"""Shared momentum: what is sent is beta1 · m + (1 - beta1) · Δ, m the momentum that all replicas hold.

The clients' half of one_bit_adam: as long as the variance is learned, the change Δ itself is sent.

Source: Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed", arXiv
2102.02888, algorithm 1, lines of the worker.
Memory: the rule's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kilotune.core.lazy import no_grad
from kilotune.optimizer import State
from kilotune.optimizer._wrapped import INNER, Wrapped

if TYPE_CHECKING:
    from torch import Tensor

MOMENTUM, DECAY = "m", "decay"


class SharedMomentum(Wrapped):
    """Local steps whose sum enters the momentum of all."""

    gives = frozenset({"momentum"})

    def init(self, param: Tensor) -> State:
        return self.inner_init(param)

    def begin(self, param: Tensor, state: State, public: State, steps: int) -> None:
        if DECAY in public:
            state |= {MOMENTUM: public[MOMENTUM], DECAY: public[DECAY]}

    def update(self, gradient: Tensor, state: State, param: Tensor, lr: float) -> Tensor:
        """The rule's own change."""
        return self.inner_update(gradient, state, param, lr)

    @no_grad
    def outgoing(self, change: Tensor, state: State) -> Tensor:
        if DECAY not in state:
            return change
        beta = float(state[DECAY])
        return change.mul(1 - beta).add_(state[MOMENTUM], alpha=beta)

    def carried(self, state: State) -> State:
        """The rule's state."""
        return {key: value for key, value in state.items() if key.startswith(INNER)}


METHOD = SharedMomentum
