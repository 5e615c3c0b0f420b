"""Dirichlet: for every label, shares of the clients ~ Dir(alpha); small alpha = few labels per client.

Source: Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks", arXiv 1905.12022; the
minimum of rows with re-drawing: Li et al., "Federated Learning on Non-IID Data Silos: An Experimental Study",
arXiv 2102.02079.
Departs: counts are multinomial draws; rounding the cumulated shares down would give all rows of rare labels to the
last client. Redrawing ends after 1,000 tries with an error; the official code loops for ever.
"""

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from kilotune.core.errors import DataError
from kilotune.partition import Partition
from kilotune.partition._names import client_names

TRIES = 1000


class Dirichlet(Partition):
    example: ClassVar[dict[str, Any]] = {"num_clients": 3, "min_rows": 2}

    alpha: float = Field(0.5, gt=0, description="concentration; 0.5 as in Li et al.")
    num_clients: int = Field(10, ge=1, description="clients; 10 as in Li et al.")
    field: str = Field("task", description="row field that holds the label; ours")
    min_rows: int = Field(10, ge=1, description="rows every client must get; 10 as in Li et al.")

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,)

    def split(self, rows: list[dict[str, str]], rng: np.random.Generator) -> dict[str, np.ndarray]:
        if len(rows) < self.num_clients * self.min_rows:
            raise DataError(
                f"partition.min_rows: got {self.min_rows} for {self.num_clients} clients, "
                f"expected at most {len(rows) // self.num_clients} with {len(rows)} training rows."
            )
        _, labels, totals = np.unique([row[self.field] for row in rows], return_inverse=True, return_counts=True)
        counts = self._counts(totals, rng)  # (labels, clients)
        owner = np.empty(len(rows), dtype=np.int64)
        for label, shares in enumerate(counts):
            owner[rng.permutation(np.flatnonzero(labels == label))] = np.repeat(np.arange(self.num_clients), shares)
        return {name: np.flatnonzero(owner == number) for number, name in enumerate(client_names(self.num_clients))}

    def _counts(self, totals: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Rows per label and client (L, K), drawn until every client has min_rows."""
        for _ in range(TRIES):
            shares = rng.dirichlet(np.full(self.num_clients, self.alpha), size=len(totals))  # (L, K)
            counts = rng.multinomial(totals, shares)
            if counts.sum(axis=0).min() >= self.min_rows:
                return counts
        raise DataError(
            f"partition dirichlet: none of {TRIES} draws gave each of {self.num_clients} clients at least "
            f"{self.min_rows} rows of {len(totals)} labels. Raise alpha (now {self.alpha:g}) or lower min_rows."
        )


METHOD = Dirichlet
