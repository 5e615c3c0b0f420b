"""Groups of tensors and their budgets of seeds, as Ferret splits a model.

Source: Shu et al., "Ferret: Federated Full-Parameter Tuning at Scale for Large Language Models", arXiv 2409.06277;
rules of the official code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

SLICE = 2**20  # numbers that are squared at once


def groups_of(sizes: dict[str, int]) -> list[list[str]]:
    """Tensors in model order, filled up to 0.9 · median size; a bigger tensor is a group of its own."""
    limit = 0.9 * float(np.median(list(sizes.values()))) if sizes else 0.0
    groups: list[list[str]] = []
    room = -1.0  # below 0: the last group is closed
    for name, size in sizes.items():
        if size <= room:
            groups[-1].append(name)
            room -= size
        else:
            groups.append([name])
            room = limit - size
    return groups


def budgets(norms: np.ndarray, num_seeds: int) -> np.ndarray:
    """(G,) int: K seeds for the group of the largest norm, others in proportion, at least 2 (never above K)."""
    top = norms.max(initial=0.0)
    share = norms / top if top > 0 else np.zeros_like(norms)
    return np.minimum(np.maximum((num_seeds * share).astype(np.int64), 2), num_seeds)


def square_norm(values: np.ndarray) -> float:
    """Σ x² in float64, the same bits for any number of threads."""
    slices = (values[at : at + SLICE].astype(np.float64) for at in range(0, values.size, SLICE))
    return sum(float(np.sum(part * part)) for part in slices)


def flat(tensor: Tensor) -> np.ndarray:
    """(n,) float32; shares memory with a contiguous float32 CPU tensor."""
    return tensor.detach().cpu().float().contiguous().reshape(-1).numpy()
