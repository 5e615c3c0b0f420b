"""Robust rules: each equal to its definition written out, and none moved far by liars."""

from itertools import combinations

import numpy as np
import pytest
import torch

from kilotune.aggregation import SeedUpdate, TensorUpdate, _robust
from kilotune.aggregation.geometric_median import GeometricMedian
from kilotune.aggregation.mean import Mean
from kilotune.aggregation.multi_krum import MultiKrum
from kilotune.aggregation.trimmed_mean import TrimmedMean
from kilotune.core.rng import stream

RULES = [MultiKrum(), GeometricMedian(), TrimmedMean()]


def crowd(honest: int, liars: int, size: int = 40, far: float = 1e6) -> list[np.ndarray]:
    """Honest vectors around (1, 1, ..), liars together far away from them."""
    rng = stream(honest, "crowd", liars)
    near = [1 + 0.3 * rng.normal(size=size) for _ in range(honest)]
    away = [far * np.ones(size) + rng.normal(size=size) for _ in range(liars)]
    return [vector.astype(np.float32) for vector in near + away]


def tensors(vector: np.ndarray) -> TensorUpdate:
    return TensorUpdate({"b": torch.from_numpy(vector[:13]), "a": torch.from_numpy(vector[13:]).reshape(-1, 1)})


def pairs(vector: np.ndarray) -> SeedUpdate:
    """Each amount in two halves, in an order of its own."""
    order = np.random.default_rng(len(vector)).permutation(2 * vector.size)
    halves = np.concatenate([vector / 2, vector / 2])
    return SeedUpdate(np.tile(np.arange(vector.size), 2)[order], halves[order].astype(np.float32))


def flat(update) -> np.ndarray:
    if isinstance(update, TensorUpdate):
        return np.concatenate([update.tensors["b"].numpy(), update.tensors["a"].numpy().reshape(-1)]).astype(np.float64)
    total = np.zeros(40)
    np.add.at(total, update.indices, update.coefs)
    return total


@pytest.mark.parametrize("kind", [tensors, pairs])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.method_name())
def test_two_liars_of_ten_move_the_result_by_no_more_than_honest_clients_differ(rule, kind, monkeypatch):
    """Kills: a rule that still averages them in; pairs of one direction that are not added up first."""
    monkeypatch.setattr(_robust, "SLICE", 11)
    honest, all_of_them = crowd(8, 0), crowd(8, 0) + crowd(0, 2)
    got = flat(rule.combine([kind(v) for v in all_of_them], np.full(10, 0.1), {}))
    centre = np.mean(honest, axis=0)
    spread = max(np.linalg.norm(vector - centre) for vector in honest)
    assert np.linalg.norm(got - centre) <= spread
    mean = Mean().combine([tensors(v) for v in all_of_them], np.full(10, 0.1), {})
    assert np.linalg.norm(flat(mean) - centre) > 1e5  # what they do without a rule


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.method_name())
def test_the_order_of_clients_does_not_change_a_bit_of_pairs(rule):
    """Kills: ties broken by the place in the list; sums in order of arrival."""
    updates = [pairs(v) for v in [*crowd(5, 2), crowd(5, 0)[0]]]
    weights = np.array([3, 1, 4, 1, 5, 2, 6, 5]) / 27
    results = set()
    for seed in range(6):
        order = stream(seed, "order").permutation(8)
        got = rule.combine([updates[i] for i in order], weights[order], {})
        results.add((got.indices.tobytes(), got.coefs.tobytes()))
    assert len(results) == 1


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.method_name())
def test_one_client_and_equal_clients_are_the_identity_on_pairs(rule):
    """Kills: votes that do not sum to 1."""
    vector = crowd(1, 0)[0]
    for count in (1, 2, 5):
        got = rule.combine([pairs(vector)] * count, rule.weights(list(range(1, count + 1))), {})
        assert np.array_equal(flat(got).astype(np.float32), vector)


def krum_scores(vectors: list[np.ndarray], malicious: int) -> list[float]:
    """The paper's score: the sum over the best set of n - f - 2 others, by trying all sets."""
    others = len(vectors) - malicious - 2
    scores = []
    for i, vector in enumerate(vectors):
        gaps = [float(np.sum((vector - other.astype(np.float64)) ** 2)) for j, other in enumerate(vectors) if j != i]
        scores.append(min(sum(chosen) for chosen in combinations(gaps, others)))
    return scores


@pytest.mark.parametrize(("honest", "liars"), [(5, 1), (7, 2), (9, 0)])
def test_multi_krum_averages_those_with_the_smallest_scores(honest, liars):
    """Kills: one neighbour too many or too few; squared distances of the wrong pairs; one client kept too many."""
    vectors, rule = crowd(honest, liars, far=3.0), MultiKrum()
    count = len(vectors)
    malicious = rule.num_malicious(count)
    best = sorted(range(count), key=krum_scores(vectors, malicious).__getitem__)[: count - malicious]
    weights = np.arange(1, count + 1) / np.arange(1, count + 1).sum()
    _, votes = rule.judged([tensors(v) for v in vectors], weights, {})
    expected = np.zeros(count)
    expected[best] = weights[best] / weights[best].sum()
    np.testing.assert_allclose(votes, expected, rtol=1e-12)


@pytest.mark.parametrize(("clients", "malicious"), [(1, 0), (3, 0), (4, 0), (5, 1), (6, 1), (7, 2), (10, 2), (11, 3)])
def test_multi_krum_expects_as_many_liars_as_its_proof_allows(clients, malicious):
    """Kills: n < 2f + 3, where the rule may choose a liar's update."""
    assert MultiKrum().num_malicious(clients) == malicious


def test_the_geometric_median_has_no_downhill_direction():
    """Kills: steps that stop early or use other weights. At the minimum Σ p (x - v) / ‖x - v‖ = 0."""
    vectors = [v.astype(np.float64) for v in crowd(6, 3, far=50.0)]
    weights = np.arange(1, 10) / 45
    got, votes = GeometricMedian().judged([tensors(v.astype(np.float32)) for v in vectors], weights, {})
    point = sum(vote * vector for vote, vector in zip(votes, vectors, strict=True))
    np.testing.assert_allclose(flat(got), point, rtol=1e-6)  # one float32 rounding
    slope = sum(w * (x - point) / np.linalg.norm(x - point) for w, x in zip(weights, vectors, strict=True))
    assert np.linalg.norm(slope) < 1e-6


def test_the_geometric_median_holds_until_half_of_the_weight_lies():
    """Kills: a breakdown point below one half."""
    honest = crowd(6, 0)
    centre = np.mean(honest, axis=0)
    vectors = honest + crowd(0, 4, far=1e9)
    got = flat(GeometricMedian().combine([tensors(v) for v in vectors], np.full(10, 0.1), {}))
    assert np.linalg.norm(got - centre) < 10 * max(np.linalg.norm(v - centre) for v in honest)


@pytest.mark.parametrize(("clients", "trimmed"), [(1, 0), (2, 0), (3, 1), (5, 1), (10, 2), (11, 3)])
def test_the_trimmed_mean_is_the_mean_of_the_middle_values(clients, trimmed):
    """Kills: trimming by rows instead of number by number; one end only; weights left with the wrong values."""
    vectors = crowd(clients, 0)
    weights = np.arange(1, clients + 1) / np.arange(1, clients + 1).sum()
    rule = TrimmedMean()
    assert rule.num_trimmed(clients) == trimmed
    got = flat(rule.combine([tensors(v) for v in vectors], weights, {}))
    for k in range(40):
        middle = sorted((float(v[k]), w) for v, w in zip(vectors, weights, strict=True))[trimmed : clients - trimmed]
        assert got[k] == pytest.approx(sum(w * x for x, w in middle) / sum(w for _, w in middle), rel=2.0**-23)


def test_a_direction_that_one_client_names_alone_gets_no_vote():
    """Kills: a liar that chooses a direction nobody else has, and is its only voter."""
    honest = [pairs(v) for v in crowd(4, 0)]
    lie = SeedUpdate(np.array([39, 99]), np.array([1.0, 1e6], np.float32))
    got = TrimmedMean().combine([*honest, lie], np.full(5, 0.2), {})
    assert 99 not in got.indices


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.method_name())
def test_updates_of_different_tables_are_refused(rule):
    updates = [TensorUpdate({"w": torch.ones(3)}), TensorUpdate({"w": torch.ones(1)})]
    with pytest.raises(ValueError, match="differ in names or shapes"):
        rule.combine(updates, np.array([0.5, 0.5]), {})


@pytest.mark.parametrize("rule", [MultiKrum(), GeometricMedian()], ids=lambda rule: rule.method_name())
def test_the_weights_reported_are_those_of_the_sum(rule):
    """Kills: a ledger from which a client is subtracted with a weight it never had."""
    vectors = crowd(5, 2)
    gathering = rule.gather()
    for vector, count in zip(vectors, (3, 1, 4, 1, 5, 9, 2), strict=True):
        gathering.add(tensors(vector), count)
    got = flat(gathering.result({}))
    expected = sum(w * v.astype(np.float64) for w, v in zip(gathering.weights(), vectors, strict=True))
    np.testing.assert_allclose(got, expected, rtol=2.0**-23)
    assert gathering.weights().sum() == pytest.approx(1, abs=1e-12)
    assert gathering.weights()[5:].max() < 1e-3
