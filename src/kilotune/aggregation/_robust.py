"""What the robust rules share: distances between updates as they were sent, and an order that no arrival changes.

An update is a vector: its tensors laid end to end, or the amount along each direction it names. Rules that choose
weights see distances only; the weighted sum is then made by `mean` or `seed_sum`, exact and rounded once.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal, cast

import numpy as np

from kilotune.aggregation import Aggregation, SeedUpdate, State, TensorUpdate, Update
from kilotune.aggregation.mean import Mean
from kilotune.aggregation.seed_sum import SeedSum, grouped_sums

SLICE = 2**18  # numbers of every update looked at together


def pair_table(updates: list[SeedUpdate]) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Directions named by any update, their groups if there are any, and (n, directions) float64: the amount of each
    update along each of them, 0 where it names none."""
    grouped = updates[0].groups is not None
    if any((update.groups is not None) != grouped for update in updates):
        raise ValueError("some updates have groups and some have none, expected one codec for all.")
    span = max(int(update.indices.max(initial=0)) for update in updates) + 1
    keys = [u.indices + (span * u.groups if u.groups is not None else 0) for u in updates]
    union = np.unique(np.concatenate(keys)).astype(np.int64)
    table = np.zeros((len(updates), union.size))
    for row, key, update in zip(table, keys, updates, strict=True):
        found, sums = grouped_sums(key, update.coefs.astype(np.float64))
        row[np.searchsorted(union, found)] = sums
    return union % span, union // span if grouped else None, table


def slices(updates: list[Update]) -> Iterator[np.ndarray]:
    """The updates as (n, some numbers) matrices, one after the other; together they hold every number once."""
    if isinstance(updates[0], SeedUpdate):
        yield pair_table(cast(list[SeedUpdate], updates))[2]
        return
    tables = [cast(TensorUpdate, update).tensors for update in updates]
    if any({n: t.shape for n, t in table.items()} != {n: t.shape for n, t in tables[0].items()} for table in tables):
        raise ValueError("the clients' updates differ in names or shapes, expected equal tables.")
    for name in sorted(tables[0]):
        flat = [table[name].detach().cpu().float().numpy().reshape(-1) for table in tables]
        for start in range(0, flat[0].size, SLICE):
            yield np.stack([values[start : start + SLICE] for values in flat])


def canonical_order(updates: list[Update], weights: np.ndarray) -> list[int]:
    """The updates' places, sorted by content and then weight: every order of arrival gives the same sequence."""
    digests = [hashlib.sha256() for _ in updates]
    for part in slices(updates):
        for digest, row in zip(digests, part, strict=True):
            digest.update(np.ascontiguousarray(row + 0).tobytes())  # + 0: one zero, without a sign
    return sorted(range(len(updates)), key=lambda i: (digests[i].digest(), weights[i]))


def square_distances(updates: list[Update]) -> np.ndarray:
    """(n, n) float64."""
    total = np.zeros((len(updates), len(updates)))
    for part in slices(updates):
        wide = part.astype(np.float64)
        for i in range(len(updates)):
            for j in range(i):
                total[i, j] += np.square(wide[i] - wide[j]).sum()
    return total + total.T


class Choosing(Aggregation):
    """A rule that decides from distances how much every update counts."""

    takes: ClassVar[Literal["tensors", "seeds", "any"]] = "any"
    linear: ClassVar[bool] = False

    @abstractmethod
    def votes(self, squares: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """(n,) float64 >= 0, sum 1, from squared distances (n, n) and the weights without the rule (n,)."""

    def judged(self, updates: list[Update], weights: np.ndarray, state: State) -> tuple[Update, np.ndarray]:
        order = canonical_order(updates, weights)
        ordered = [updates[i] for i in order]
        chosen = self.votes(square_distances(ordered), weights[order])
        used = np.zeros(len(updates))
        used[order] = chosen
        counted = [i for i in order if used[i] > 0]
        rule: Aggregation = SeedSum() if isinstance(updates[0], SeedUpdate) else Mean()
        return rule.combine([updates[i] for i in counted], used[counted], {}), used

    def combine(self, updates: list[Update], weights: np.ndarray, state: State) -> Update:
        return self.judged(updates, weights, state)[0]
