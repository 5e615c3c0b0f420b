"""FLoRA, FlexLoRA and LoRA-FAIR against the plain sum of products, formed whole in float64."""

import numpy as np
import pytest
import torch

from kilotune.aggregation import TensorUpdate
from kilotune.aggregation.flex_lora import FlexLora
from kilotune.aggregation.flora_stack import FloraStack
from kilotune.aggregation.lora_fair import LoraFair
from kilotune.aggregation.mean import Mean
from kilotune.core.linalg import truncated_svd
from kilotune.core.rng import stream

A, B = "m.lora_A.default.weight", "m.lora_B.default.weight"
OUT, WIDTH, RANK = 9, 8, 8  # a layer as wide as the rank
WEIGHTS = np.array([0.5, 0.3, 0.2])


def client(seed: int, rank: int = RANK) -> TensorUpdate:
    """A pair whose components beyond `rank` are zero, as a client of lower rank comes out of its codec."""
    rng = stream(seed, "pair")
    b, a = rng.normal(size=(OUT, RANK)), rng.normal(size=(RANK, WIDTH))
    b[:, rank:], a[rank:] = 0, 0
    return TensorUpdate({A: torch.from_numpy(a).float(), B: torch.from_numpy(b).float()})


def product(update: TensorUpdate) -> np.ndarray:
    return update.tensors[B].double().numpy() @ update.tensors[A].double().numpy()


def wanted(clients: list[TensorUpdate], weights: np.ndarray = WEIGHTS) -> np.ndarray:
    return sum(w * product(c) for w, c in zip(weights, clients, strict=True))


def test_stacked_factors_are_the_sum_of_products_for_mixed_ranks_and_averaged_ones_are_not():
    """Kills: a weight on both factors; a rank taken from the layer's width; components of zeros on the wire."""
    clients = [client(0, 2), client(1, 3), client(2, 8)]
    stacked = FloraStack().combine(clients, WEIGHTS, {})
    assert stacked.tensors[A].shape == (2 + 3 + 8, WIDTH)
    assert stacked.tensors[B].shape == (OUT, 2 + 3 + 8)
    np.testing.assert_allclose(product(stacked), wanted(clients), atol=1e-5)
    naive = Mean().combine(clients, WEIGHTS, {})
    assert np.abs(product(naive) - wanted(clients)).max() > 0.1


def test_one_of_many_clients_is_stacked_as_if_it_were_alone():
    """Kills: ranks of the whole roster in place of those who answered."""
    stacked = FloraStack().combine([client(1, 3)], np.ones(1), {})
    assert stacked.tensors[A].shape == (3, WIDTH)
    np.testing.assert_allclose(product(stacked), product(client(1, 3)), atol=1e-6)


@pytest.mark.parametrize("rank", [2, 8])
def test_factors_made_anew_are_the_best_of_their_rank_by_falling_singular_value(rank):
    """Kills: components in another order, which a client of lower rank would cut wrongly; singular values twice."""
    clients = [client(seed, 8) for seed in range(3)]
    for update in clients:
        update.tensors.update({A: update.tensors[A][:rank], B: update.tensors[B][:, :rank]})
    dense = wanted(clients)
    again = FlexLora().combine(clients, WEIGHTS, {})
    u, s, vt = np.linalg.svd(dense)
    for cut in range(1, rank + 1):
        kept = again.tensors[B][:, :cut].double().numpy() @ again.tensors[A][:cut].double().numpy()
        best = (u[:, :cut] * s[:cut]) @ vt[:cut]
        np.testing.assert_allclose(kept, best, atol=1e-5)
        error = np.sqrt((s[cut:] ** 2).sum())
        assert np.linalg.norm(dense - kept) == pytest.approx(error, rel=1e-5, abs=1e-4)


def fair_error(update: TensorUpdate, clients: list[TensorUpdate]) -> float:
    return float(np.linalg.norm(wanted(clients) - product(update)))


def test_the_correction_is_the_least_of_what_it_is_made_to_lower():
    """Kills: a wrong sign of the ridge; Ā of one client only; a correction of the wrong side."""
    clients = [client(seed, 4) for seed in range(3)]
    ridge = 0.3
    corrected = LoraFair(ridge=ridge).combine(clients, WEIGHTS, {})
    mean = Mean().combine(clients, WEIGHTS, {})
    torch.testing.assert_close(corrected.tensors[A], mean.tensors[A], atol=1e-6, rtol=1e-6)
    a, b = mean.tensors[A].double(), mean.tensors[B].double()
    delta = (corrected.tensors[B].double() - b).requires_grad_()
    objective = (torch.from_numpy(wanted(clients)) - (b + delta) @ a).square().sum() + ridge * delta.square().sum()
    (slope,) = torch.autograd.grad(objective, delta)
    assert float(slope.abs().max()) < 1e-4  # convex: no slope, no lower value
    assert fair_error(corrected, clients) < fair_error(mean, clients)


def test_the_correction_is_exact_for_equal_a_and_nothing_for_a_high_price():
    clients = [client(seed) for seed in range(3)]
    far = LoraFair(ridge=1e9).combine(clients, WEIGHTS, {})
    torch.testing.assert_close(far.tensors[B], Mean().combine(clients, WEIGHTS, {}).tensors[B], atol=1e-5, rtol=0)
    for update in clients:
        update.tensors[A] = clients[0].tensors[A]
    assert fair_error(LoraFair(ridge=1e-9).combine(clients, WEIGHTS, {}), clients) < 1e-5


def test_a_sketched_decomposition_is_the_whole_one_with_the_same_bits_for_any_thread_count():
    """Kills: too few iterations; signs left to LAPACK; sums split by threads."""
    matrix = torch.from_numpy(stream(0, "m").normal(size=(160, 120))).float()
    u, s, vt = truncated_svd(matrix, 4, stream(1))
    best = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(s.numpy(), best[:4], rtol=5e-3)
    error = np.linalg.norm(matrix.double().numpy() - ((u * s) @ vt).numpy())
    assert error == pytest.approx(np.sqrt((best[4:] ** 2).sum()), rel=1e-3)
    assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        again = truncated_svd(matrix, 4, stream(1))
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip((u, s, vt), again, strict=True))
