"""Kept units: row j of Σ_k B_k A_k is weighted over the clients that have unit j, p_kj = p_k / Σ_{i has j} p_i, and
so is column j where the units are what a layer reads.

For clients that have removed heads or channels: what a client does not have, it has no say on. Rows of B (columns of A)
that are zero throughout are units that are not there. The components stand side by side, as in FLoRA, so clients may
have any rank and a unit that nobody has stays as it is, bit for bit.

Source: the aggregation over heterogeneous submodels of Diao, Ding and Tarokh, "HeteroFL: Computation and Communication
    Efficient Federated Learning for Heterogeneous Clients", arXiv 2010.01264, sec. 3, on the products of FLoRA (Wang et
    al., arXiv 2409.05976).
Departs: the sums of weights are taken over rows and over columns apart, which is the same where a layer has removed
    units on one of its sides.
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


class KeptUnits(FactorRule):
    """All components of all clients, each unit weighted over those that have it."""

    needs: ClassVar[frozenset[str]] = frozenset({"factor_pair", "fresh_start"})
    gives: ClassVar[frozenset[str]] = frozenset({"rank_sum", "kept_units"})

    def prepared(self, clients: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        return trimmed(clients)

    def pair(self, clients: Sequence[Pair], weights: np.ndarray) -> Pair:
        rows = _shares([b.ne(0).any(1) for b, _ in clients], weights)
        columns = _shares([a.ne(0).any(0) for _, a in clients], weights)
        left = [b / rows[:, None] for b, _ in clients]
        right = [float(weight) * a / columns for weight, (_, a) in zip(weights, clients, strict=True)]
        return torch.cat(left, dim=1), torch.cat(right, dim=0)


def _shares(kept: list[Tensor], weights: np.ndarray) -> Tensor:
    """(units,) float64: what the clients that have a unit weigh together; 1 where all or none have it."""
    table = torch.stack(kept)
    found = (torch.from_numpy(np.asarray(weights, np.float64))[:, None] * table).sum(0)
    return torch.where(table.all(0) | ~table.any(0), 1.0, found)


METHOD = KeptUnits
