"""FLoRA stack: Σ_k p_k B_k A_k = [B_1 … B_n] [p_1 A_1; …; p_n A_n], exact for clients of any ranks.

Source: Wang, Shen, He, Sun, Wang, Lyu and Li, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous
    Low-Rank Adaptations", arXiv 2409.05976, sec. 3.2; the weights lie on A alone, as in the authors' code.
Departs: the clients stand in an order that their numbers decide; components that are zero are left out.
Wire: the result has the rank Σ_k r_k, so the downlink grows with the clients of a round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kilotune.aggregation._factors import FactorRule, trimmed
from kilotune.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from kilotune.aggregation._factors import Pair


class FloraStack(FactorRule):
    """All components of all clients, side by side."""

    needs: ClassVar[frozenset[str]] = frozenset({"factor_pair", "fresh_start"})
    gives: ClassVar[frozenset[str]] = frozenset({"rank_sum"})

    def prepared(self, clients: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        return trimmed(clients)

    def pair(self, clients: Sequence[Pair], weights: np.ndarray) -> Pair:
        rows = [float(weight) * a for weight, (_, a) in zip(weights, clients, strict=True)]
        return torch.cat([b for b, _ in clients], dim=1), torch.cat(rows, dim=0)


METHOD = FloraStack
