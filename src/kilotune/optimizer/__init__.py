"""Optimizer: one tensor at a time, so that a gradient can be used and freed before the next exists."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from kilotune.core.method import Method
from kilotune.core.types import State

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Optimizer", "State"]


class Optimizer(Method):
    """Contract. The same rules serve local steps and the server's step over the mean update.

    In a federation a round begins with `begin`, ends with `outgoing` and, where `hears` is set, with `sent`; what
    `carried` leaves is there in the client's next round (recipe.keep_optimizer). `follow` and `foresee` are the server
    rule's.
    """

    hears: ClassVar[bool] = False
    """Whether `sent` is called, which costs one decoding of what was sent."""

    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        1e-3, description="learning rate; auto: measured by an estimator that can"
    )

    @property
    def by_parts(self) -> bool:
        """Whether `update` of a part of a tensor is that part of the tensor's update, without any state."""
        return False

    @property
    def anchored(self) -> bool:
        """Whether no step of a round can be taken before it is known where the round begins: `begin` looks at it."""
        return type(self).begin is not Optimizer.begin

    @property
    def copies(self) -> int:
        """Numbers it holds beside every parameter while a round is trained."""
        return 0

    @property
    def public_copies(self) -> int:
        """Numbers beside every parameter that `follow` keeps, on the server and on every client."""
        return 0

    @property
    def foresees(self) -> bool:
        """Whether `foresee` says what a round will change before anybody has answered."""
        return False

    @abstractmethod
    def init(self, param: Tensor) -> State:
        """Fresh state for one tensor (no bytes for a stateless rule)."""

    @abstractmethod
    def update(self, gradient: Tensor, state: State, param: Tensor, lr: float) -> Tensor:
        """The change to add to `param` (same shape, float32). `state` moves on in place."""

    def begin(self, param: Tensor, state: State, public: State, steps: int) -> None:
        """A round of `steps` local steps starts at `param`. `public` is what `follow` has kept of the rounds so far."""

    def outgoing(self, change: Tensor, state: State) -> Tensor:
        """What is sent when `change` is what a round has come to."""
        return change

    def sent(self, change: Tensor, state: State) -> None:
        """What `outgoing` gave as everybody reads it. `state` moves on in place."""

    def carried(self, state: State) -> State:
        """The part of `state` that the next round needs; all of it by default."""
        return state

    def follow(self, change: Tensor, public: State) -> Tensor:
        """What a round changes a tensor by, of which everybody hears `change`: that itself, unless a rule says more.

        `public` is what everybody makes of the rounds; it moves on in place.
        """
        return change

    def foresee(self, public: State) -> Tensor | None:
        """What `follow` will give for the next round whatever it brings; None: nobody knows. `public` stays."""
        return None
