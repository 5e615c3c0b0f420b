"""Shards: rows sorted by label, cut into K x S equal shards; every client gets S of them at random.

Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", arXiv 1602.05629,
section 3 (200 shards of 300 examples, two per client).
"""

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from kilotune.core.errors import DataError
from kilotune.partition import Partition
from kilotune.partition._names import client_names


class Shards(Partition):
    example: ClassVar[dict[str, Any]] = {"num_clients": 3}

    num_clients: int = Field(10, ge=1, description="clients; ours (the paper has 100)")
    shards_per_client: int = Field(2, ge=1, description="shards per client; paper, section 3")
    field: str = Field("task", description="row field to sort by; ours")

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,)

    def split(self, rows: list[dict[str, str]], rng: np.random.Generator) -> dict[str, np.ndarray]:
        num_shards = self.num_clients * self.shards_per_client
        if len(rows) < num_shards:
            raise DataError(
                f"partition shards: got {self.num_clients} clients x {self.shards_per_client} shards, "
                f"expected at most {len(rows)} shards, one training row each."
            )
        order = np.argsort(np.array([row[self.field] for row in rows]), kind="stable")
        shards = np.array_split(order, num_shards)
        deal = rng.permutation(num_shards).reshape(self.num_clients, self.shards_per_client)
        names = client_names(self.num_clients)
        return {
            name: np.sort(np.concatenate([shards[s] for s in hand])) for name, hand in zip(names, deal, strict=True)
        }


METHOD = Shards
