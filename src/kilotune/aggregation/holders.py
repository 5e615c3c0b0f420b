"""Holders: every pair over the clients that trained it, Σ_k p_k B_k A_k / Σ_k p_k over k that hold it, factored again.

For clients that train different matrices and ranks. Who has no components of a pair has no say on it, and a pair that
nobody has stays zero.

Source: "Automated Federated Pipeline for Parameter-Efficient Fine-Tuning of Large Language Models" (FedPipe): each
    matrix over the machines that trained it; the products as in FlexLoRA (Bai et al., arXiv 2402.11505).
Departs: FedPipe fills the factors of smaller ranks up with zeros and averages them one by one, which is not the mean of
    the changes; here the products are averaged, and only what goes beyond the recipe's rank is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kilotune.aggregation._factors import FactorRule
from kilotune.aggregation.flex_lora import FlexLora
from kilotune.core.lazy import torch

if TYPE_CHECKING:
    from kilotune.aggregation._factors import Pair


class Holders(FactorRule):
    """The best pair for the mean product of those that have one."""

    needs: ClassVar[frozenset[str]] = frozenset({"factor_pair", "fresh_start"})

    def pair(self, clients: Sequence[Pair], weights: np.ndarray) -> Pair:
        held = [at for at, (_, a) in enumerate(clients) if a.any()]
        if not held:
            b, a = clients[0]
            return torch.zeros_like(b), torch.zeros_like(a)
        shares = weights[held]
        return FlexLora().pair([clients[at] for at in held], shares / shares.sum())


METHOD = Holders
