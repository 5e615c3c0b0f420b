"""Mean: Σ p_i x_i, element by element, with the same bits for any order of the clients.

Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data" (FedAvg), arXiv
1602.05629, algorithm 1.
Departs: float64 sums are made independent of the order by adding the clients in the order of their weight and of the
bytes of the slice at hand, which no permutation of the list can change.
Memory: the result and a few slices of 2^22 numbers in all.
"""

from typing import cast

import numpy as np
import torch

from kilotune.aggregation import Aggregation, State, TensorUpdate, Update

SLICE = 2**22  # numbers of all clients together that are worked on at once


def slice_mean(parts: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """(m,) float64 from (m,) float32 of each client."""
    order = range(len(parts))
    if len(parts) > 2:  # the sum of two does not depend on their order
        order = sorted(order, key=lambda i: (weights[i], parts[i].tobytes()))  # type: ignore[assignment]
    total = np.zeros(parts[0].size)
    for i in order:
        total += weights[i] * parts[i].astype(np.float64)
    return total


class Mean(Aggregation):
    """Weighted mean of tensors."""

    def combine(self, updates: list[Update], weights: np.ndarray, state: State) -> TensorUpdate:
        """Float32 tensors in name order; remembers nothing."""
        tables = [cast(TensorUpdate, update).tensors for update in updates]
        shapes = {name: tensor.shape for name, tensor in tables[0].items()}
        for table in tables[1:]:
            if {name: tensor.shape for name, tensor in table.items()} != shapes:
                raise ValueError("mean: the clients' updates differ in names or shapes, expected equal tables.")
        length = max(1, SLICE // len(tables))
        combined = {}
        for name in sorted(shapes):
            flat = [np.ascontiguousarray(table[name].detach().cpu().float().reshape(-1).numpy()) for table in tables]
            out = np.empty(flat[0].size, np.float32)
            for start in range(0, out.size, length):
                end = start + length
                out[start:end] = slice_mean([values[start:end] for values in flat], weights)
            combined[name] = torch.from_numpy(out).reshape(shapes[name])
        return TensorUpdate(combined)


METHOD = Mean
