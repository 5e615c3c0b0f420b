"""Wrapped: a rule that has another one inside, whose state and learning rate it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, ValidationInfo, field_validator

from kilotune.core.nested import Nested
from kilotune.optimizer import Optimizer, State
from kilotune.optimizer.sgd import SGD

if TYPE_CHECKING:
    from torch import Tensor

INNER = "rule."


class Wrapped(Optimizer):
    """The base of rules around a `rule`. The learning rate is the outer one's."""

    rule: Annotated[Optimizer, Nested("optimizer")] = Field(
        default_factory=SGD, validate_default=True, description="the rule inside; its learning rate is `lr` beside it"
    )

    @field_validator("rule")
    @classmethod
    def _takes_the_rate(cls, rule: Optimizer, info: ValidationInfo) -> Optimizer:
        lr = info.data.get("lr", rule.lr)
        if "lr" in rule.model_fields_set and rule.lr != lr:
            raise ValueError("a rule without lr, which stands beside it")
        if isinstance(rule, Wrapped):
            raise ValueError("a rule that wraps no other")
        return rule.model_copy(update={"lr": lr})

    @property
    def copies(self) -> int:
        """The rule's own."""
        return self.rule.copies

    def inner_init(self, param: Tensor) -> State:
        """The inner rule's fresh state, as part of the outer one's."""
        return {INNER + key: value for key, value in self.rule.init(param).items()}

    def inner_update(self, gradient: Tensor, state: State, param: Tensor, lr: float) -> Tensor:
        """The inner rule's change; its part of `state` moves on in place."""
        inner = {key.removeprefix(INNER): value for key, value in state.items() if key.startswith(INNER)}
        delta = self.rule.update(gradient, inner, param, lr)
        state.update({INNER + key: value for key, value in inner.items()})
        return delta
