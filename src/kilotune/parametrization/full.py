"""Full: every weight (or every selected one) is trained where it stands, w ← w + Δ.

Source: the plain method every other one is compared with; federated as in McMahan et al.,
    "Communication-Efficient Learning of Deep Networks from Decentralized Data", arXiv 1602.05629, algorithm 1.
Memory: one more copy of the trained weights while a federated round runs (rollback and difference).
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kilotune.parametrization import Directions, Parametrization, Trainable
from kilotune.parametrization._direct import DirectTrainable
from kilotune.parametrization._targets import parameters, select

if TYPE_CHECKING:
    from torch import nn


class Full(Parametrization):
    targets: Literal["all"] | tuple[str, ...] = Field("all", description="tensors to train: all, or parts of names")

    def attach(self, model: nn.Module, *, basis: Directions | None, seed: int) -> Trainable:
        return DirectTrainable(model, parameters(model, self.targets))

    def numbers(self, shapes: dict[str, tuple[int, ...]], hidden: int) -> dict[str, int]:
        """Of the selected weights."""
        return {name: prod(shapes[name]) for name in select(list(shapes), self.targets)}


METHOD = Full
