"""Seed sum: equal to an obvious sum; the proof tests of FedKSeed-Pro's card."""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from kilotune.aggregation import SeedUpdate
from kilotune.aggregation.seed_sum import SeedSum, pack_probabilities, probabilities, unpack_probabilities
from kilotune.core.errors import WireError
from kilotune.core.rng import stream

SIZE = 50


def draw(client: int, count: int = 60, size: int = SIZE) -> SeedUpdate:
    rng = stream(client, "pairs")
    coefs = rng.normal(size=count) * 10.0 ** rng.integers(-4, 5, count)
    return SeedUpdate(rng.integers(0, size, count), coefs.astype(np.float32), rng.integers(0, 4, count))


def without_groups(update: SeedUpdate) -> SeedUpdate:
    return SeedUpdate(update.indices, update.coefs)


@pytest.mark.parametrize("grouped", [True, False])
def test_equals_the_exact_sum_of_every_direction_rounded_once(grouped: bool) -> None:
    """Kills: groups added together; unsorted or repeated directions; float32 sums. Oracle: math.fsum."""
    clients = [draw(i) if grouped else without_groups(draw(i)) for i in range(5)]
    weights, terms = SeedSum().weights([1, 2, 3, 4, 5]), defaultdict(list)
    for weight, update in zip(weights, clients, strict=True):
        groups = update.groups if grouped else np.zeros(60, np.int64)
        for key, coef in zip(zip(groups, update.indices, strict=True), update.coefs, strict=True):
            terms[tuple(map(int, key))].append(weight * float(coef))
    got = SeedSum().combine(clients, weights, {})
    assert (got.groups is not None) == grouped
    keys = list(zip((got.groups if grouped else 0 * got.indices).tolist(), got.indices.tolist(), strict=True))
    assert keys == sorted(terms)
    assert (got.indices.dtype, got.coefs.dtype) == (np.int64, np.float32)
    for key, coef in zip(keys, got.coefs, strict=True):
        exact = math.fsum(terms[key])
        assert abs(float(coef) - exact) <= 2.0**-24 * abs(exact) + 1e-12 * max(map(abs, terms[key]))


def test_shuffled_pairs_give_the_same_bits() -> None:
    """Kills: sums in order of arrival within a client."""
    update, weights = draw(0), np.ones(1)
    first = SeedSum().combine([update], weights, {})
    for seed in range(5):
        order = stream(seed, "shuffle").permutation(60)
        shuffled = SeedUpdate(update.indices[order], update.coefs[order], update.groups[order])
        again = SeedSum().combine([shuffled], weights, {})
        assert again.coefs.tobytes() == first.coefs.tobytes()
        assert again.indices.tolist() == first.indices.tolist()
        assert again.groups.tolist() == first.groups.tolist()


def test_cancellation_does_not_depend_on_the_order() -> None:
    """Kills: adding in order of arrival: 1e8, -1e8 and 1e-9 end differently in float64."""
    coefs, results = np.array([1e8, -1e8, 1e-9], np.float32), set()
    for order in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]):
        clients = [SeedUpdate(np.array([4]), coefs[i : i + 1]) for i in order]
        results.add(SeedSum().combine(clients, np.full(3, 1 / 3), {}).coefs.tobytes())
    assert len(results) == 1


def test_exact_zeros_are_dropped_and_nothing_is_a_valid_sum() -> None:
    """Kills: bytes for directions that do not move; an error when all clients skipped all steps."""
    update = SeedUpdate(np.array([3, 3, 8]), np.array([0.5, -0.5, 2.0], np.float32))
    assert SeedSum().combine([update], np.ones(1), {}).indices.tolist() == [8]
    nothing = SeedUpdate(np.zeros(0, np.int64), np.zeros(0, np.float32))
    assert SeedSum(selection="amplitude").combine([nothing], np.ones(1), {}).indices.size == 0


def test_uniform_selection_remembers_nothing() -> None:
    """Kills: state that grows although nobody reads it."""
    state: dict[str, torch.Tensor] = {}
    SeedSum().combine([draw(0)], np.ones(1), state)
    assert state == {}


def raw_probabilities(history: dict[int, list[float]], size: int) -> np.ndarray:
    """The official rule on raw lists, written out."""
    mean = [np.mean(np.abs(np.clip([0.0, *history[k]], -1000, 1000))) for k in range(size)]
    scaled = [(m - min(mean)) / (max(mean) - min(mean) + 1e-10) for m in mean]
    weights = np.exp(scaled)
    return weights / weights.sum()


def test_probabilities_equal_those_of_raw_histories() -> None:
    """Kills: means per round instead of per step; weighting by clients; a lost initial zero; the wrong unit."""
    rule, state, history = SeedSum(selection="amplitude", unit=0.25), {}, defaultdict(list)
    for number in range(4):
        clients = [without_groups(draw(10 * number + i, size=20 + 10 * number)) for i in range(3)]
        rule.combine(clients, rule.weights([5, 1, 2]), state)
        for update in clients:
            for k, coef in zip(update.indices, update.coefs, strict=True):
                history[int(k)].append(float(coef) / 0.25)
    np.testing.assert_allclose(probabilities(state, 60), raw_probabilities(history, 60), rtol=1e-9)


def test_the_history_does_not_depend_on_the_order_of_clients() -> None:
    """Kills: amplitudes added in order of arrival, which would give every server its own probabilities."""
    clients, states = [without_groups(draw(i, size=3)) for i in range(4)], []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        states.append({})
        SeedSum(selection="amplitude").combine([clients[i] for i in order], np.full(4, 0.25), states[-1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in ("abs_sum", "count"))


@pytest.mark.parametrize("outlier", [0.0, 1e9])
def test_probabilities_sum_to_one_and_their_ratio_is_at_most_e(outlier: float) -> None:
    """Kills: an unclipped outlier; a softmax without min-max scaling."""
    state: dict[str, torch.Tensor] = {}
    update = without_groups(draw(0))
    update.coefs[7] = outlier
    SeedSum(selection="amplitude").combine([update], np.ones(1), state)
    p = probabilities(state, SIZE)
    assert abs(p.sum() - 1) <= 1e-12
    assert p.max() / p.min() <= math.e * (1 + 1e-9)


def test_equal_histories_give_uniform_probabilities() -> None:
    """Kills: noise of order 1 from (m - min) / (max - min) when both vanish."""
    state: dict[str, torch.Tensor] = {}
    assert np.abs(probabilities(state, SIZE) * SIZE - 1).max() <= 1e-12
    update = SeedUpdate(np.arange(SIZE), np.full(SIZE, -3.0, np.float32))
    SeedSum(selection="amplitude").combine([update], np.ones(1), state)
    assert np.abs(probabilities(state, SIZE) * SIZE - 1).max() <= 1e-12


def test_draws_follow_the_probabilities_that_travelled() -> None:
    """Kills: sender and receiver drawing from different numbers. Chi-square of 1e5 draws within 4 sigma of its mean."""
    state: dict[str, torch.Tensor] = {}
    SeedSum(selection="amplitude").combine([without_groups(draw(0))], np.ones(1), state)
    exact = probabilities(state, SIZE)
    payload = pack_probabilities(exact)
    p = unpack_probabilities(payload, SIZE)
    assert len(payload) == 2 * SIZE
    np.testing.assert_allclose(p, exact, rtol=2.0**-10)  # two fp16 roundings: the number and the sum
    assert abs(p.sum() - 1) <= 1e-12
    counts = np.bincount(stream(0, "draws").choice(SIZE, 100_000, p=p), minlength=SIZE)
    chi2 = ((counts - 100_000 * p) ** 2 / (100_000 * p)).sum()
    assert abs(chi2 - (SIZE - 1)) <= 4 * (2 * (SIZE - 1)) ** 0.5


@pytest.mark.parametrize("payload", [b"", b"\0" * 98, b"\0" * 100, b"\0\x7c" * 50, b"\0\xbc" * 50, b"\1\x7e" * 50])
def test_impossible_probabilities_are_refused(payload: bytes) -> None:
    """Kills: zero, negative, infinite or NaN probabilities; a wrong number of directions."""
    with pytest.raises(WireError, match="probabilities: got"):
        unpack_probabilities(payload, SIZE)


def test_amplitudes_of_grouped_pairs_are_refused() -> None:
    """Kills: a setting without effect in silence."""
    with pytest.raises(ValueError, match=r"seed_sum\.selection"):
        SeedSum(selection="amplitude").combine([draw(0)], np.ones(1), {})
