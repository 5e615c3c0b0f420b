"""Scaffold: each of K local steps also moves by (b - b_i) / K; what is sent is α · (v_i - b_i) alone.

b_i is what the client's own rounds have shown it, b the mean of all b_i (server_optimizer: controlled_averaging), both
as the change of one round, -lr · K times the paper's c_i and c. With u_i = y - x - b + b_i after the last step:
    v_i ← (1 - β) · v_i + β · u_i        δ_i = C(α · (v_i - b_i))        b_i ← b_i + δ_i
C is the uplink. With α = β = 1 and a lossless C this is SCAFFOLD with option II of its control variates, in one vector.

Source: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", arXiv 1910.06378,
algorithm 1; Huang, Li and Li, "Stochastic Controlled Averaging for Federated Learning with Communication Compression",
arXiv 2308.08165: SCALLION (α, for unbiased C) and SCAFCOM (β, for any C).
Departs: variates count in changes, not gradients, which is the same at one learning rate and makes sense for any rule.
What the server scales down or does not count is still in b_i.
Memory: the rule's own, 8 bytes per number in a round, 4 between rounds (8 with β < 1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from kilotune.core.lazy import no_grad, torch
from kilotune.optimizer import State
from kilotune.optimizer._memory import zeros_for
from kilotune.optimizer._wrapped import INNER, Wrapped

if TYPE_CHECKING:
    from torch import Tensor

OWN, AVERAGE, PUBLIC, STEP = "own", "average", "public", "step"


class Scaffold(Wrapped):
    """Local steps without client drift."""

    hears: ClassVar[bool] = True
    gives = frozenset({"control_variates"})
    example: ClassVar[dict[str, Any]] = {"beta": 0.5}

    alpha: float = Field(
        1.0, gt=0, le=1, description="share of the difference that is sent; below 1 for a rough unbiased uplink"
    )
    beta: float = Field(1.0, gt=0, le=1, description="share of the new round in v_i; below 1 for a biased uplink")

    @property
    def copies(self) -> int:
        """The rule's own, both controls, a step of their difference, and v_i."""
        return self.rule.copies + 3 + int(self.beta < 1)

    def init(self, param: Tensor) -> State:
        """The rule's state, and no control yet."""
        zeros = zeros_for(param)
        state = {**self.inner_init(param), OWN: zeros}
        return state | ({AVERAGE: zeros.clone()} if self.beta < 1 else {})

    def begin(self, param: Tensor, state: State, public: State, steps: int) -> None:
        state[PUBLIC] = public.get(OWN, torch.zeros_like(state[OWN]))
        state[STEP] = torch.sub(state[PUBLIC], state[OWN]).div_(steps)

    @no_grad
    def update(self, gradient: Tensor, state: State, param: Tensor, lr: float) -> Tensor:
        """Reads nothing but its arguments; mutates only the state."""
        delta = self.inner_update(gradient, state, param, lr)
        return delta.add_(state[STEP]) if STEP in state else delta

    @no_grad
    def outgoing(self, change: Tensor, state: State) -> Tensor:
        drift = torch.sub(change, state[PUBLIC])  # u_i - b_i
        if self.beta < 1:
            seen = drift.add_(state[OWN])
            drift = state[AVERAGE].lerp_(seen, self.beta).sub(state[OWN])
        return drift.mul_(self.alpha)

    @no_grad
    def sent(self, change: Tensor, state: State) -> None:
        state[OWN].add_(change)

    def carried(self, state: State) -> State:
        """The client's own control and the rule's state."""
        return {key: value for key, value in state.items() if key in (OWN, AVERAGE) or key.startswith(INNER)}


METHOD = Scaffold
