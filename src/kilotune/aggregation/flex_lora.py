"""FlexLoRA: Σ_k p_k B_k A_k = U Σ Vᵀ, of which B = U_r Σ_r and A = V_rᵀ go back, the best pair of rank r there is.

Source: Bai, Chen, Qian, Yao and Li, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
    Client Resources", arXiv 2402.11505, sec. 3; the authors' code (FederatedScope).
Departs: the full product is never formed: QR of the factors side by side and the decomposition of a small core give the
    same. All clients get one pair of the recipe's rank, its components by falling singular value, and a client of a
    lower rank takes the first ones: that is the decomposition of its own rank. The scale is the same for all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kilotune.aggregation._factors import FactorRule
from kilotune.core.factors import resized
from kilotune.core.lazy import torch
from kilotune.core.linalg import product_svd

if TYPE_CHECKING:
    from kilotune.aggregation._factors import Pair


class FlexLora(FactorRule):
    """Average the products, then factor again."""

    def pair(self, clients: Sequence[Pair], weights: np.ndarray) -> Pair:
        rank = clients[0][0].shape[1]
        left = torch.cat([float(weight) * b for weight, (b, _) in zip(weights, clients, strict=True)], dim=1)
        u, s, vt = product_svd(left, torch.cat([a for _, a in clients], dim=0), rank)
        return resized(u * s, 1, rank), resized(vt, 0, rank)


METHOD = FlexLora
