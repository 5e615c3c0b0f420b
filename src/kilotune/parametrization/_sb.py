"""The trainable of LoRA-SB: B and A fixed, R trained, and B R always following it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kilotune.core.factors import A, factor_pairs
from kilotune.core.lazy import torch
from kilotune.core.linalg import on_grid, truncated_svd
from kilotune.core.rng import stream
from kilotune.parametrization import Sink
from kilotune.parametrization._derived import DerivedTrainable

if TYPE_CHECKING:
    from torch import Tensor, nn

R = ".lora_R"


class LoraSbTrainable(DerivedTrainable):
    """A LoRA adapter with the factors A and B R: gradients of B R become those of R, and B R follows R."""

    accumulates = False

    def __init__(self, model: nn.Module, params: dict[str, nn.Parameter], bases: dict[str, Tensor]) -> None:
        """`params`: both factors of the adapter; `bases`: B by the name of B R."""
        pairs = factor_pairs(params)
        super().__init__(model, {b: params[b] for b, _ in pairs})
        self._bases = bases
        self._rights = {a: params[a].data for _, a in pairs}
        self._names = {b: a.partition(A)[0] + R for b, a in pairs}
        self._sources = {name: b for b, name in self._names.items()}
        self.wire = {name: torch.zeros(bases[b].shape[1], bases[b].shape[1]) for name, b in self._sources.items()}

    def pull(self, name: str, gradient: Tensor, sink: Sink) -> None:
        sink(self._names[name], self._bases[name].T @ gradient)

    def start_along(self, parts: Sequence[Callable[[], Tensor]], size: float, seed: int) -> None:
        """B, R and A of the best approximation of the first step of full tuning, -size · sign(gradient)."""
        weights = dict(self.model.named_parameters())
        places = {name: a.partition(A)[0] for name, a in zip(self._sources, self._rights, strict=True)}
        covered = [weights[f"{place}.base_layer.weight"].requires_grad_(True) for place in places.values()]
        gradients = [torch.zeros_like(weight) for weight in covered]
        try:
            for part in parts:
                for gradient, found in zip(gradients, torch.autograd.grad(part(), covered), strict=True):
                    gradient += found
        finally:
            for weight in covered:
                weight.requires_grad_(False)
        for (name, place), gradient, right in zip(places.items(), gradients, self._rights.values(), strict=True):
            rank = len(self.wire[name])
            u, s, vt = truncated_svd(gradient.sign_().mul_(-size), rank, stream(seed, "lora_sb", place))
            self._bases[self._sources[name]].copy_(on_grid(u))
            right.copy_(on_grid(vt))
            self.wire[name].copy_(torch.diag(s))
        self.follow(self.wire)

    def state(self) -> dict[str, Tensor]:
        lefts = {name.replace(R, ".lora_B"): self._bases[b] for name, b in self._sources.items()}
        rights = {a.partition(A)[0] + ".lora_A": right for a, right in self._rights.items()}
        return dict(sorted({**self.wire, **lefts, **rights}.items()))

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, value in self.state().items():
            value.copy_(tensors[name])
        self._anchor.clear()
        self.follow(self.wire)

    def follow(self, wire: dict[str, Tensor], *names: str) -> None:
        for name in names or wire:
            b = self._sources[name]
            self.params[b].data = self._bases[b] @ wire[name]
