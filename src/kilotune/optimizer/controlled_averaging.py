"""Controlled averaging: x ← x + lr · (b + mean δ_i), b ← b + p · mean δ_i; the server's half of scaffold.

What is broadcast is the change of x alone: from it everybody follows b as b ← (1 - p) · b + p · change / lr, which
forgets what the downlink has rounded away. p is the share of the clients that take part in a round.

Source: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", arXiv 1910.06378,
algorithm 1; in one vector each way after Huang, Li and Li, "Stochastic Controlled Averaging for Federated Learning with
Communication Compression", arXiv 2308.08165.
Departs: c is not sent but follows from the ledger, so nothing is added to the downlink. p is given, not counted.
Memory: 4 bytes per number, on the server and on every client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from kilotune.core.lazy import no_grad, torch
from kilotune.optimizer import Optimizer, State
from kilotune.optimizer._memory import zeros_for
from kilotune.optimizer.scaffold import OWN

if TYPE_CHECKING:
    from torch import Tensor


class ControlledAveraging(Optimizer):
    """The server's step with the clients' differences from what they have shown before."""

    needs = frozenset({"control_variates"})

    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(1.0, description="global step size; paper, section 7")
    participation: float = Field(1.0, gt=0, le=1, description="S/N, clients of a round in all clients")

    @property
    def copies(self) -> int:
        """The control."""
        return 1

    @property
    def public_copies(self) -> int:
        """The control as everybody follows it."""
        return 1

    def init(self, param: Tensor) -> State:
        return {OWN: zeros_for(param)}

    @no_grad
    def update(self, gradient: Tensor, state: State, param: Tensor, lr: float) -> Tensor:
        """Reads nothing but its arguments; mutates only the state. The gradient is minus the mean difference."""
        delta = torch.sub(state[OWN], gradient).mul_(lr)
        state[OWN].sub_(gradient, alpha=self.participation)
        return delta

    @no_grad
    def follow(self, change: Tensor, public: State) -> Tensor:
        held = public.get(OWN, torch.zeros_like(change))
        public[OWN] = torch.lerp(held, change / float(self.lr), self.participation)
        return change


METHOD = ControlledAveraging
