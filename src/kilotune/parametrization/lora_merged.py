"""LoRA merged: every round starts with a new pair, A random and B = 0, and ends with w ← w + s · B A.

B A may have any rank in what is merged: the components of all clients together, as FLoRA stacks them.

Source: Wang, Shen, He, Sun, Wang, Lyu and Li, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous
    Low-Rank Adaptations", arXiv 2409.05976, sec. 3.
Departs: A is drawn from the round's root, the same for all clients (of a lower rank: its first rows); one scale s for
    all ranks.
Memory: the weights that get a pair are written anew, in memory of their own, at the first round that is applied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from kilotune.core.factors import A, factor_pairs, with_product
from kilotune.core.lazy import torch
from kilotune.core.rng import stream
from kilotune.parametrization import Directions, Trainable
from kilotune.parametrization._pairs import PairsMethod, PairsTrainable

if TYPE_CHECKING:
    from torch import Tensor, nn


class LoraMergedTrainable(PairsTrainable):
    """Between rounds there is no adapter: its state is the weights."""

    def __init__(self, model: nn.Module, params: dict[str, nn.Parameter], scale: float) -> None:
        super().__init__(model, params, scale)
        everything = dict(model.named_parameters())
        self._pairs = factor_pairs(params)
        self._weights = {a: everything[a.partition(A)[0] + ".base_layer.weight"] for _, a in self._pairs}

    def begin(self, root: int, forward_only: bool = False) -> None:
        self._fresh(root)
        super().begin(root, forward_only)

    def _fresh(self, root: int) -> None:
        """The pair a round starts with."""
        for _, a in self._pairs:
            start, bound = self.wire[a], self.wire[a].shape[1] ** -0.5
            start.copy_(torch.from_numpy(stream(root, "lora_A", a).uniform(-bound, bound, tuple(start.shape))))
        self._empty()

    def _empty(self) -> None:
        """Make the product zero."""
        for b, _ in self._pairs:
            self.wire[b].zero_()

    def _take(self, pairs: dict[str, Tensor]) -> None:
        for b, a in self._pairs:
            weight = self._weights[a]
            weight.data = with_product(weight.data, pairs[b], pairs[a], self.scale)

    def state(self) -> dict[str, Tensor]:
        return {name: weight.data for name, weight in sorted(self._by_name().items())}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, weight in self._by_name().items():
            weight.data = tensors[name].clone()
        self._empty()
        self._anchor.clear()

    def _by_name(self) -> dict[str, nn.Parameter]:
        return {a.partition(A)[0] + ".weight": weight for a, weight in self._weights.items()}


class LoraMerged(PairsMethod):
    gives: ClassVar[frozenset[str]] = frozenset({"values", "factor_pair", "fresh_start"})

    def attach(self, model: nn.Module, *, basis: Directions | None, seed: int) -> Trainable:
        return LoraMergedTrainable(*self._wrapped(model, seed), self.scale)


METHOD = LoraMerged
