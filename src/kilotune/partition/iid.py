"""IID: a random permutation of the rows, dealt out in equal parts (sizes differ by at most one).

Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", arXiv 1602.05629,
section 3.
"""

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from kilotune.core.errors import DataError
from kilotune.partition import Partition
from kilotune.partition._names import client_names


class IID(Partition):
    example: ClassVar[dict[str, Any]] = {"num_clients": 3}

    num_clients: int = Field(4, ge=1, description="clients; ours")

    def split(self, rows: list[dict[str, str]], rng: np.random.Generator) -> dict[str, np.ndarray]:
        if len(rows) < self.num_clients:
            raise DataError(
                f"partition.num_clients: got {self.num_clients}, expected at most the {len(rows)} training rows."
            )
        parts = np.array_split(rng.permutation(len(rows)), self.num_clients)
        return {name: np.sort(part) for name, part in zip(client_names(self.num_clients), parts, strict=True)}


METHOD = IID
