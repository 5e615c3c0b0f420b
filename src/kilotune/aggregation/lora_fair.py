"""LoRA-FAIR: Ā = Σ p_k A_k and B̄ + ΔB, ΔB = (Σ p_k B_k A_k Āᵀ - B̄ Ā Āᵀ) (Ā Āᵀ + λ I)⁻¹, B̄ = Σ p_k B_k.

ΔB is the least ‖Σ p_k B_k A_k - (B̄ + ΔB) Ā‖² + λ ‖ΔB‖² can be made by; A stays the mean, from which clients start.

Source: Bian, Wang, Zhang and Xu, "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization
    Refinement", arXiv 2411.14961, sec. 4.
Departs: the distance is the squared norm, whose minimum is a formula, not the cosine, which says nothing about size and
    has to be searched for.
Limits: what is corrected lies in the row space of Ā, so it needs clients that start alike and train briefly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from kilotune.aggregation._factors import FactorRule
from kilotune.core.lazy import torch
from kilotune.core.linalg import one_thread

if TYPE_CHECKING:
    from kilotune.aggregation._factors import Pair


class LoraFair(FactorRule):
    """The mean of the factors, B corrected towards the mean of the products."""

    needs: ClassVar[frozenset[str]] = frozenset({"factor_pair", "equal_ranks"})

    ridge: float = Field(0.01, gt=0, description="lambda, what a correction costs; paper: 0.01, to its own distance")

    def pair(self, clients: Sequence[Pair], weights: np.ndarray) -> Pair:
        shares = weights.tolist()
        with one_thread():
            a = torch.stack([share * a for share, (_, a) in zip(shares, clients, strict=True)]).sum(0)
            b = torch.stack([share * b for share, (b, _) in zip(shares, clients, strict=True)]).sum(0)
            wanted = torch.stack(
                [share * (b_k @ (a_k @ a.T)) for share, (b_k, a_k) in zip(shares, clients, strict=True)]
            )
            gram = a @ a.T
            rest = wanted.sum(0) - b @ gram
            ridge = gram + self.ridge * torch.eye(len(gram), dtype=gram.dtype)
            return b + torch.linalg.solve(ridge, rest.T).T, a


METHOD = LoraFair
