"""SSF pool: y ← y ⊙ mean_k γ + mean_k β behind every linear layer and norm, from the k of P sets that a row chooses.

A row's query is the mean of the base's last hidden states over the tokens of its prompt; the k keys of the largest
cosine with it choose the sets, for the whole row and for all that is generated after it. In training the loss has
pull · (1 - Σ_k cos) more for every row, through which keys learn. P · (2 Σ widths + h) numbers are trained and travel.

Source: Feng, Yu, Liu, Xu, Khan and Zuo, "Towards Instance-adaptive Inference for Federated Learning" (FedIns), arXiv
    2308.06051; the sets: Lian et al., "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning"
    (SSF), arXiv 2210.08823.
Departs: for language models instead of classifiers of images: the query is made of the prompt, not of the class token,
    and there is no pool of heads. Each row of a batch has sets of its own; the authors' code takes one row at a time. γ
    starts at 1 and β at 0 instead of normal around them, so that the tuned model starts as the base; the loss on the
    answers weighs 1, not 0.9.
Memory: every batch is passed through the base once more; rows are padded, because two that share their start may
    differ in their sets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from kilotune.core.lazy import torch
from kilotune.core.rng import stream
from kilotune.parametrization import Directions, Parametrization, Trainable
from kilotune.parametrization._derived import DerivedTrainable
from kilotune.parametrization._ssf import Pool

if TYPE_CHECKING:
    from torch import Tensor, nn

SPREAD = 0.02  # of the keys at their start; the authors' code cuts them off at 2, a hundred times as far


class PoolTrainable(DerivedTrainable):
    """The sets and keys of a pool. Probes replace them, because a choice is made once for both halves of a doubled
    batch."""

    def follow(self, wire: dict[str, Tensor], *names: str) -> None:
        for name in names or wire:
            self.params[name].data = wire[name]


class SsfPool(Parametrization):
    writes_base: ClassVar[bool] = False
    gives: ClassVar[frozenset[str]] = frozenset({"chooser"})

    size: int = Field(25, ge=1, description="P, sets in the pool; FedIns: 25")
    count: int = Field(3, ge=1, description="k, sets that a row chooses; FedIns: 3")
    pull: float = Field(0.1, ge=0, description="weight of 1 - Σ cos in the loss; FedIns: 0.1")

    @model_validator(mode="after")
    def _enough(self) -> SsfPool:
        if self.count > self.size:
            raise ValueError("count of at most size")
        return self

    def attach(self, model: nn.Module, *, basis: Directions | None, seed: int) -> Trainable:
        for param in model.parameters():
            param.requires_grad_(False)
        hidden = int(model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
        keys = torch.from_numpy(stream(seed, "keys").normal(0.0, SPREAD, (self.size, hidden))).float()
        pool = Pool(model, self.size, self.count, self.pull, keys)
        model.chooser = pool  # type: ignore[assignment]
        return PoolTrainable(model, pool.params())


METHOD = SsfPool
