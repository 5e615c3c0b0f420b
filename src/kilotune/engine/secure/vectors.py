"""Updates as vectors of one length: tensors by rising name, pairs as one sum per direction."""

import numpy as np
import torch

from kilotune.aggregation.seed_sum import grouped_sums
from kilotune.core.types import SeedUpdate, TensorUpdate, Update
from kilotune.engine.composing.plan import Plan

Shapes = dict[str, tuple[int, ...]]


def flatten(plan: Plan, update: Update) -> np.ndarray:
    """(n,) float64."""
    if isinstance(update, SeedUpdate):
        sums = np.zeros(plan.num_directions)
        keys, totals = grouped_sums(update.indices, update.coefs.astype(np.float64))
        sums[keys] = totals
        return sums
    parts = [update.tensors[name].detach().cpu().reshape(-1).double().numpy() for name in sorted(update.tensors)]
    return np.concatenate(parts)


def rebuild(plan: Plan, values: np.ndarray, shapes: Shapes) -> Update:
    """The update that `flatten` made these numbers from, rounded once to float32."""
    rounded = values.astype(np.float32)
    if plan.uplink.takes == "seeds":
        used = np.flatnonzero(rounded)
        return SeedUpdate(used, rounded[used])
    tensors, start = {}, 0
    for name in sorted(shapes):
        size = int(np.prod(shapes[name], dtype=np.int64))
        tensors[name] = torch.from_numpy(rounded[start : start + size].reshape(shapes[name]))
        start += size
    return TensorUpdate(tensors)
