"""Trimmed mean: of every number the k = ⌈trim_frac · n⌉ largest and smallest values go, and the rest is averaged.

Source: Yin, Chen, Ramchandran and Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical
Rates", arXiv 1803.01498, definition 2.
Departs: what is left is weighted; k is lowered so that a value is left. A direction that a client does not name counts
as its vote for 0, so pairs need directions that all clients share (`shared_directions`).
Memory: all updates of a round at once.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, cast

import numpy as np
from pydantic import Field

from kilotune.aggregation import Aggregation, SeedUpdate, State, TensorUpdate, Update
from kilotune.aggregation._robust import pair_table, slices
from kilotune.core.lazy import torch


class TrimmedMean(Aggregation):
    """Number by number, so no client has one weight in all of it."""

    takes: ClassVar[Literal["tensors", "seeds", "any"]] = "any"
    linear: ClassVar[bool] = False

    trim_frac: float = Field(0.2, ge=0, lt=0.5, description="part of the clients left out at either end, rounded up")

    def num_trimmed(self, num_clients: int) -> int:
        """Values left out at either end."""
        return min(math.ceil(self.trim_frac * num_clients - 1e-9), (num_clients - 1) // 2)

    def combine(self, updates: list[Update], weights: np.ndarray, state: State) -> Update:
        """Float32; pairs by rising (group, direction), zeros dropped."""
        if isinstance(updates[0], SeedUpdate):
            indices, groups, table = pair_table(cast(list[SeedUpdate], updates))
            coefs = self._trimmed(table, weights).astype(np.float32)
            kept = coefs != 0
            return SeedUpdate(indices[kept], coefs[kept], None if groups is None else groups[kept])
        parts = [self._trimmed(part, weights).astype(np.float32) for part in slices(updates)]
        flat, tensors, start = np.concatenate(parts), {}, 0
        for name, like in sorted(updates[0].tensors.items()):
            tensors[name] = torch.from_numpy(flat[start : start + like.numel()].copy()).reshape(like.shape)
            start += like.numel()
        return TensorUpdate(tensors)

    def _trimmed(self, table: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """(m,) float64 from (n, m); equal values are told apart by weight, so that no order of clients shows."""
        by_weight = np.argsort(weights, kind="stable")
        table, weights = table[by_weight], weights[by_weight]
        trimmed = self.num_trimmed(len(weights))
        kept = np.argsort(table, axis=0, kind="stable")[trimmed : len(weights) - trimmed]
        counts = weights[kept]
        total = (np.take_along_axis(table, kept, axis=0) * counts).sum(axis=0)
        return np.asarray(total / counts.sum(axis=0), dtype=np.float64)


METHOD = TrimmedMean
