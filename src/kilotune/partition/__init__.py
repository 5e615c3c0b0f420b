"""Partition: one set of examples becomes the private sets of several clients."""

from abc import abstractmethod

import numpy as np

from kilotune.core.method import Method

__all__ = ["Partition"]


class Partition(Method):
    """Contract: a disjoint cover of range(N), deterministic, and no client without rows."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Row fields this partition reads (the data layer reports them when missing)."""
        return ()

    @abstractmethod
    def split(self, rows: list[dict[str, str]], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Client id -> indices (n_c,) int64 of its rows, in ascending order; clients sorted by id.

        `rows` hold only the fields named by `fields`. Raises DataError when it cannot be done.
        """
