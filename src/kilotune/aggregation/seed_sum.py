"""Seed sum: a_k = Σ_i p_i Σ_j [k_ij = k] c_ij, the clients' steps collected by direction.

Source: Qin et al., "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under
18 Kilobytes" (FedKSeed; `selection: amplitude` is FedKSeed-Pro), arXiv 2312.06353.
Departs: sums are in float64 over sorted terms, so no order of clients or pairs changes a bit; one sum per direction
and, for Ferret, per group. Histories of Pro are kept as Σ|h| and a count instead of lists.
Wire: selection probabilities p travel as K fp16 numbers K·p_k (little-endian); both ends use the rounded ones.
"""

from __future__ import annotations

from typing import Literal, cast

import numpy as np
from pydantic import Field

from kilotune.aggregation import Aggregation, SeedUpdate, State, Update
from kilotune.core.errors import WireError
from kilotune.core.lazy import torch

CLIP = 1000.0  # |scalar| beyond which a step says nothing more about its direction; official code


def grouped_sums(keys: np.ndarray, terms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unique ascending keys and the float64 sum of each one's terms, independent of their order."""
    order = np.lexsort((terms, keys))
    unique, inverse = np.unique(keys[order], return_inverse=True)
    return unique, np.bincount(inverse, weights=terms[order], minlength=unique.size)  # adds one after the other


def probabilities(state: State, size: int) -> np.ndarray:
    """(size,) float64 that sums to 1: softmax of the min-max normalised mean amplitude of every direction.

    Every mean holds one initial 0.0, so a direction never used counts as amplitude 0; largest / smallest <= e.
    """
    mean = np.zeros(size)
    if "abs_sum" in state:
        total, count = state["abs_sum"].numpy(), state["count"].numpy()
        mean[: total.size] = total / (count + 1)
    scaled = (mean - mean.min()) / (mean.max() - mean.min() + 1e-10)
    weights = np.exp(scaled)
    return weights / weights.sum()


def pack_probabilities(p: np.ndarray) -> bytes:
    """2·K bytes: K·p_k as fp16, near 1 by construction."""
    return (p * p.size).astype("<f2").tobytes()


def unpack_probabilities(payload: bytes, size: int) -> np.ndarray:
    """(size,) float64 that sums to 1. Raises WireError for a cut or impossible payload."""
    if len(payload) != 2 * size:
        raise WireError(f"probabilities: got {len(payload)} bytes, expected {2 * size}. The payload is cut or foreign.")
    weights = np.frombuffer(payload, "<f2").astype(np.float64)
    if not (np.isfinite(weights) & (weights > 0)).all():
        raise WireError("probabilities: got numbers that are not finite or not positive. The payload is altered.")
    return weights / weights.sum()


class SeedSum(Aggregation):
    """Weighted sum per direction; may count how large each direction's scalars were."""

    takes = "seeds"

    selection: Literal["uniform", "amplitude"] = Field(
        "uniform", description="how clients draw directions: all alike, or often those with large scalars (Pro)"
    )
    unit: float = Field(1.0, gt=0, description="|coefficient| per unit of scalar: the clients' learning rate")

    def combine(self, updates: list[Update], weights: np.ndarray, state: State) -> SeedUpdate:
        """Ascending unique (group, index), zeros dropped. State, only for amplitude: `abs_sum`, `count` (K,) float64,
        as long as the largest direction seen."""
        pairs = [cast(SeedUpdate, update) for update in updates]
        grouped = pairs[0].groups is not None
        if any((update.groups is not None) != grouped for update in pairs):
            raise ValueError("seed_sum: some updates have groups and some have none, expected one codec for all.")
        indices = np.concatenate([update.indices for update in pairs]).astype(np.int64)
        groups = np.concatenate([update.groups for update in pairs]).astype(np.int64) if grouped else None
        terms = np.concatenate([p * update.coefs.astype(np.float64) for p, update in zip(weights, pairs, strict=True)])
        if self.selection == "amplitude":
            if grouped:
                raise ValueError("seed_sum.selection: got amplitude for pairs with groups, expected uniform.")
            self._remember(indices, np.concatenate([update.coefs for update in pairs]), state)
        span = int(indices.max(initial=0)) + 1
        keys, sums = grouped_sums(indices if groups is None else groups * span + indices, terms)
        coefs = sums.astype(np.float32)
        keys, coefs = keys[coefs != 0], coefs[coefs != 0]
        return SeedUpdate(keys % span, coefs, keys // span if grouped else None)

    def _remember(self, indices: np.ndarray, coefs: np.ndarray, state: State) -> None:
        """Add every single scalar's amplitude to its direction's history."""
        keys, sums = grouped_sums(indices, np.minimum(np.abs(coefs.astype(np.float64)) / self.unit, CLIP))
        counts = np.bincount(indices)
        for name, increment in (("abs_sum", sums), ("count", counts[keys])):
            old = state[name].numpy() if name in state else np.zeros(0)
            total = np.zeros(max(old.size, counts.size))
            total[: old.size] = old
            total[keys] += increment
            state[name] = torch.from_numpy(total)


METHOD = SeedSum
