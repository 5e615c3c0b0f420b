"""Mean: equal to an obvious weighted mean, also when tensors are larger than a slice."""

import numpy as np
import pytest
import torch

from kilotune.aggregation import TensorUpdate, _exact
from kilotune.aggregation.mean import Mean
from kilotune.core.rng import stream


def draw(client: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(stream(client, "mean").normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("length", [2**22, 40])
@pytest.mark.parametrize("num_clients", [2, 3, 6])
def test_equals_the_float64_mean_rounded_once(num_clients: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: float32 sums; rows lost at the edges of slices. Bound: one float32 rounding of a float64 sum."""
    monkeypatch.setattr(_exact, "SLICE", length)
    weights = Mean().weights([3 * i + 1 for i in range(num_clients)])
    updates = [TensorUpdate({"w": draw(client, 7, 19)}) for client in range(num_clients)]
    expected = sum(w * u.tensors["w"].double() for w, u in zip(weights, updates, strict=True))
    got = Mean().combine(updates, weights, {}).tensors["w"]
    assert (got.dtype, got.shape) == (torch.float32, (7, 19))
    assert ((got - expected).abs() <= 2.0**-24 * expected.abs() + 1e-15).all()


def test_cancellation_does_not_depend_on_the_order() -> None:
    """Kills: adding in order of arrival: 1e8, -1e8 and 1e-9 end differently in float64."""
    parts = [torch.tensor([v], dtype=torch.float32) for v in (1e8, -1e8, 1e-9)]
    weights, results = np.full(3, 1 / 3), set()
    for order in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]):
        combined = Mean().combine([TensorUpdate({"w": parts[i]}) for i in order], weights, {})
        results.add(combined.tensors["w"].numpy().tobytes())
    assert len(results) == 1


def test_updates_of_different_tables_are_not_averaged() -> None:
    """Kills: broadcasting a foreign shape in silence."""
    updates = [TensorUpdate({"w": torch.ones(3)}), TensorUpdate({"w": torch.ones(1)})]
    with pytest.raises(ValueError, match="differ in names or shapes"):
        Mean().combine(updates, np.array([0.5, 0.5]), {})
