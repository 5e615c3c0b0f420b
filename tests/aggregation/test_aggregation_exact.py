"""Exact sums: equal to the sum of fractions, whatever the order; a mean needs no list of updates."""

import math

import numpy as np
import pytest
import torch

from kilotune.aggregation import TensorUpdate, _exact
from kilotune.aggregation._exact import ExactSum, add_exactly, compiled
from kilotune.aggregation.mean import Mean
from kilotune.core.registry import find, names
from kilotune.core.rng import stream


def vectors(count: int, size: int, decades: int) -> np.ndarray:
    """(count, size) float32 whose magnitudes differ by up to 10^decades, with both signs."""
    rng = stream(count, "exact", decades)
    return (
        rng.normal(size=(count, size)) * 10.0 ** rng.integers(-decades // 2, decades // 2 + 1, (count, size))
    ).astype(np.float32)


@pytest.mark.parametrize("decades", [0, 8, 30, 70])
@pytest.mark.parametrize("length", [2**16, 7])
def test_a_sum_is_the_exact_one_rounded_once(decades: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: rounding errors that are dropped, a level that is not added up, numbers lost at the edges of slices."""
    monkeypatch.setattr(_exact, "SLICE", length)
    values, weights = vectors(40, 19, decades), [float(1 + i % 5) for i in range(40)]
    total = ExactSum(19)
    for value, weight in zip(values, weights, strict=True):
        total.add(value, weight)
    terms = values.astype(np.float64) * np.array(weights)[:, None]  # exact: 24 bits times 3
    assert total.total().tolist() == [math.fsum(column) for column in terms.T]


def test_no_order_changes_a_bit() -> None:
    """Kills: float64 sums in order of arrival."""
    values, weights = vectors(50, 64, 20), stream(0, "weights").random(50)
    results = set()
    for seed in range(5):
        total = ExactSum(64)
        for i in stream(seed, "order").permutation(50):
            total.add(values[i], float(weights[i]))
        results.add(total.total().tobytes())
    assert len(results) == 1


def test_the_compiled_addition_equals_the_plain_one() -> None:
    """Kills: a compiler that reassociates, which would make every error zero."""
    first, second = vectors(2, 500, 24).astype(np.float64) / 3
    plain, quick = ((first.copy(), np.empty(500)) for _ in range(2))
    assert add_exactly(plain[0], second, 1.7, plain[1]) == compiled()(quick[0], second, 1.7, quick[1]) is True
    assert all(a.tobytes() == b.tobytes() for a, b in zip(plain, quick, strict=True))
    assert not compiled()(np.ones(3), np.ones(3), 2.0, np.empty(3))


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_not_finite_leaves_no_rest_to_add(number: float) -> None:
    """Kills: a server that adds the rests of NaN for ever."""
    for add in (add_exactly, compiled()):
        total = np.zeros(2)
        with np.errstate(invalid="ignore"):
            assert not add(total, np.array([number, 1.0]), 1.0, np.empty(2))
        assert total.tolist()[1] == 1.0 and not np.isfinite(total[0])


@pytest.mark.parametrize("weighting", ["examples", "equal"])
@pytest.mark.parametrize("name", names("aggregation"))
def test_gathering_one_by_one_equals_combining_a_list(name: str, weighting: str) -> None:
    """Kills: shares that are not divided by their sum; equal weights forgotten on the way."""
    method = find("aggregation", name)
    rule = method(**{**method.example, "weighting": weighting})
    counts = [3, 1, 7, 2]
    if rule.takes == "seeds":
        updates = [_pairs(i) for i in range(4)]
    elif "factor_pair" in rule.needs:
        updates = [TensorUpdate(_factors(v)) for v in vectors(4, 33, 0)]
    else:
        updates = [TensorUpdate({"w": torch.from_numpy(v)}) for v in vectors(4, 33, 0)]
    gathering = rule.gather()
    for update, count in zip(updates, counts, strict=True):
        gathering.add(update, count)
    got, expected = gathering.result({}), rule.combine(updates, rule.weights(counts), {})
    if rule.takes == "seeds":
        assert got.coefs.tobytes() == expected.coefs.tobytes()
        assert got.indices.tolist() == expected.indices.tolist()
    elif "factor_pair" in rule.needs:  # several factors have one product
        (a, b), (a2, b2) = ([t for _, t in sorted(update.tensors.items())] for update in (got, expected))
        torch.testing.assert_close(b @ a, b2 @ a2, rtol=1e-5, atol=1e-5)
    else:  # fractions of counts are rounded when they come as weights, so one float32 rounding may differ
        torch.testing.assert_close(got.tensors["w"], expected.tensors["w"], rtol=2.0**-23, atol=0)


def _factors(numbers: np.ndarray) -> dict[str, torch.Tensor]:
    a, b = torch.from_numpy(numbers[:18]).view(3, 6), torch.from_numpy(numbers[18:]).view(5, 3)
    return {"x.lora_A.w": a, "x.lora_B.w": b}


def _pairs(client: int):
    from kilotune.aggregation import SeedUpdate

    rng = stream(client, "pairs")
    return SeedUpdate(rng.integers(0, 9, 12), rng.normal(size=12).astype(np.float32))


def test_a_mean_keeps_no_update() -> None:
    """Kills: a server whose memory grows with the clients of a round. Quantized updates need one float64 a number."""
    running = Mean().gather()
    for client in range(60):
        numbers = stream(client, "flat").integers(-127, 128, 4096).astype(np.float32) * 2.0**-9
        running.add(TensorUpdate({"coords": torch.from_numpy(numbers)}), 1 + client)
    (total,) = running._sums.values()
    assert sum(level.nbytes for level in total._levels) == 8 * 4096
