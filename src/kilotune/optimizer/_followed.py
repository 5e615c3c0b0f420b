"""Rules of which everybody hears the clients' mean, so that every replica takes the step itself (`follow`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kilotune.core.lazy import no_grad
from kilotune.optimizer import Optimizer, State
from kilotune.optimizer._memory import working_dtype

if TYPE_CHECKING:
    from torch import Tensor


class Followed(Optimizer):
    """The server's part of such a rule."""

    def init(self, param: Tensor) -> State:
        """The server knows nothing that the others do not."""
        return {}

    @no_grad
    def update(self, gradient: Tensor, state: State, param: Tensor, lr: float) -> Tensor:
        """What the clients' mean is."""
        return gradient.to(working_dtype(param)).neg()
