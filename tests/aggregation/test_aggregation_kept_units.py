"""Kept units: what a client does not have, it has no say on."""

import numpy as np
import torch

from kilotune.aggregation import TensorUpdate
from kilotune.aggregation.kept_units import KeptUnits
from kilotune.core.rng import stream

OUT, IN = 6, 5


def sent(client: int, rank: int, rows: list[int], columns: list[int]) -> TensorUpdate:
    rng = stream(client, "kept")
    b, a = torch.zeros(OUT, 4), torch.zeros(4, IN)  # as a codec fills them up
    b[rows, :rank] = torch.from_numpy(rng.normal(size=(len(rows), rank))).float()
    a[:rank, columns] = torch.from_numpy(rng.normal(size=(rank, len(columns)))).float()
    return TensorUpdate({"x.lora_A.w": a, "x.lora_B.w": b})


def test_every_row_or_column_is_the_mean_over_the_clients_that_have_it():
    """Kills: zeros that count as votes; weights of all clients; a unit nobody has that moves; ranks that must agree."""
    weights = np.array([0.5, 0.3, 0.2])
    have = [[0, 1, 2], [1, 2, 3], [2, 3, 4]]
    for axis in (0, 1):
        everything = list(range((IN, OUT)[axis])), have
        sides = [(h, everything[0]) if axis == 0 else (everything[0], h) for h in have]
        clients = [sent(i, rank, *side) for i, (rank, side) in enumerate(zip((1, 2, 4), sides, strict=True))]
        result = KeptUnits().combine(clients, weights, {}).tensors
        found = (result["x.lora_B.w"] @ result["x.lora_A.w"]).double().numpy()
        products = [c.tensors["x.lora_B.w"].double() @ c.tensors["x.lora_A.w"].double() for c in clients]
        for unit in range((OUT, IN)[axis]):
            owners = [i for i in range(3) if unit in have[i]]
            total = sum(weights[owners]) or 1.0
            row = found.take(unit, axis)
            parts = (weights[i] / total * products[i].select(axis, unit).numpy() for i in owners)
            np.testing.assert_allclose(row, sum(parts, np.zeros_like(row)), rtol=1e-5, atol=1e-6)
            assert bool(owners) == row.any()
