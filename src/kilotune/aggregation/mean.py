"""Mean: Σ p_i x_i, element by element, with the same bits for any order of the clients.

Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data" (FedAvg), arXiv
1602.05629, algorithm 1.
Departs: the sum is exact and rounded once, whatever the order, and clients are added as they arrive.
Memory: one update at a time and the sums (see _exact), for any number of clients.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np

from kilotune.aggregation import Aggregation, Gathering, State, TensorUpdate, Update
from kilotune.aggregation._exact import ExactSum
from kilotune.core.lazy import torch


class Running(Gathering):
    """Σ weight · x so far, of every tensor."""

    def __init__(self, rule: Mean) -> None:
        super().__init__(rule)
        self._shapes: dict[str, torch.Size] = {}
        self._sums: dict[str, ExactSum] = {}

    def add_weighted(self, update: Update, share: float) -> None:
        tensors = cast(TensorUpdate, update).tensors
        if not self._shares:
            self._shapes = {name: tensor.shape for name, tensor in sorted(tensors.items())}
            self._sums = {name: ExactSum(shape.numel()) for name, shape in self._shapes.items()}
        elif tensors.keys() != self._shapes.keys() or any(tensors[n].shape != s for n, s in self._shapes.items()):
            raise ValueError("mean: the clients' updates differ in names or shapes, expected equal tables.")
        for name, sums in self._sums.items():
            sums.add(tensors[name].detach().cpu().float().numpy().reshape(-1), share)
        self._shares.append(share)

    def result(self, state: State) -> TensorUpdate:
        """Float32 tensors in name order; remembers nothing."""
        scale, tensors = math.fsum(self._shares), {}
        for name, sums in self._sums.items():
            mean = sums.total()
            mean /= scale
            tensors[name] = torch.from_numpy(mean.astype(np.float32)).reshape(self._shapes[name])
        return TensorUpdate(tensors)


class Mean(Aggregation):
    """Weighted mean of tensors."""

    def gather(self) -> Running:
        return Running(self)

    def combine(self, updates: list[Update], weights: np.ndarray, state: State) -> TensorUpdate:
        running = self.gather()
        for update, weight in zip(updates, weights, strict=True):
            running.add_weighted(update, float(weight))
        return running.result(state)


METHOD = Mean
