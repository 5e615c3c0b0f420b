"""Rules for factor pairs: what is combined is B A, so the two factors of a pair are looked at together."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np

from kilotune.aggregation import Aggregation, State, TensorUpdate, Update
from kilotune.core.factors import component_axes, factor_pairs, resized, used_rank

if TYPE_CHECKING:
    from torch import Tensor

    Pair = tuple[Tensor, Tensor]
    """B (out, r) and A (r, in)."""


class FactorRule(Aggregation):
    """Contract: `pair` combines one pair of all clients. Clients come in an order that only their numbers decide."""

    needs: ClassVar[frozenset[str]] = frozenset({"factor_pair"})
    linear: ClassVar[bool] = False

    @abstractmethod
    def pair(self, clients: Sequence[Pair], weights: np.ndarray) -> Pair:
        """One pair from n >= 1; `weights` (n,) float64, sum 1."""

    def prepared(self, clients: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The clients' tensors as `pair` will see them."""
        return clients

    def combine(self, updates: list[Update], weights: np.ndarray, state: State) -> TensorUpdate:
        """Float32 tensors in name order; remembers nothing."""
        clients = [cast(TensorUpdate, update).tensors for update in updates]
        names = factor_pairs(clients[0])
        shapes = [{name: tuple(tensor.shape) for name, tensor in client.items()} for client in clients]
        if any(other != shapes[0] for other in shapes) or 2 * len(names) != len(shapes[0]):
            raise ValueError(f"{self.method_name()}: expected equal tables of pairs `….lora_A.…` and `….lora_B.…`.")
        order = sorted(range(len(clients)), key=lambda i: (weights[i], _digest(clients[i])))
        ordered, tensors = self.prepared([clients[i] for i in order]), {}
        for b, a in names:
            pair = self.pair([(client[b].double(), client[a].double()) for client in ordered], weights[order])
            tensors[b], tensors[a] = (factor.float().contiguous() for factor in pair)
        return TensorUpdate(dict(sorted(tensors.items())))


def trimmed(clients: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The clients' pairs without the components that are zero at their end."""
    axes = component_axes(clients[0])
    ranks = [used_rank(client) for client in clients]
    return [
        {name: resized(tensor, axes[name], rank) for name, tensor in client.items()}
        for client, rank in zip(clients, ranks, strict=True)
    ]


def _digest(tensors: dict[str, Tensor]) -> bytes:
    found = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.digest()
