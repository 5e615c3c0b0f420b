"""By field: the rows with the same value of a field are one client's.

Source: natural partitions of McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
Data", arXiv 1602.05629 (one speaking role = one client).
"""

import numpy as np
from pydantic import Field

from kilotune.core.errors import DataError
from kilotune.partition import Partition


class ByField(Partition):
    key: str = Field("client", description="row field whose value names the client; ours")

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.key,)

    def split(self, rows: list[dict[str, str]], rng: np.random.Generator) -> dict[str, np.ndarray]:
        if not rows:
            raise DataError("partition field: got no rows, expected at least one.")
        clients: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            clients.setdefault(row[self.key], []).append(index)
        return {name: np.array(clients[name], dtype=np.int64) for name in sorted(clients)}


METHOD = ByField
