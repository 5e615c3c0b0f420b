"""Singular values for a federation: in float64, on one thread, with a rule for signs, so that a run can be repeated.

LAPACK splits its work by threads, and sums that are split differently end in other bits; singular vectors are free in
their sign. Equal bits on machines of another make are more than LAPACK gives: where two ends must agree, one of them
computes and sends, or the result is put on a grid that is coarse beside the difference (`on_grid`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from kilotune.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

OVERSAMPLING = 8  # directions beyond the rank; Halko, Martinsson and Tropp, arXiv 0909.4061, sec. 4.2
POWERS = 10  # the iterations of LoRA-SB's code
SMALL = 4  # a matrix not this many times wider than its sketch is decomposed whole
GRID = 2.0**-20


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch's arithmetic does not depend on how many threads there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def truncated_svd(matrix: Tensor, rank: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), s (r,), Vᵀ (r, n) in float64 of the best approximation of `rank`; r <= min(m, n).

    Large matrices by subspace iteration: a sketch of r + 8 random directions, sharpened ten times.
    """
    sketch = rank + OVERSAMPLING
    with one_thread():
        m = matrix.detach().double()
        if min(m.shape) <= SMALL * sketch:
            return _signed(m, rank)
        q = torch.linalg.qr(m @ torch.from_numpy(rng.standard_normal((m.shape[1], sketch)))).Q
        for _ in range(POWERS):
            q = torch.linalg.qr(m @ (m.T @ q)).Q
        u, s, vt = _signed(q.T @ m, rank)
        return _same_signs(q @ u, s, vt)


def product_svd(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, s, Vᵀ in float64 of the best approximation of b a, which is never formed: b (m, k), a (k, n).

    With b = Q_b R_b and aᵀ = Q_a R_a it is Q_b (R_b R_aᵀ) Q_aᵀ, and only the core is decomposed.
    """
    with one_thread():
        qb, rb = torch.linalg.qr(b.detach().double())
        qa, ra = torch.linalg.qr(a.detach().double().T)
        u, s, vt = _signed(rb @ ra.T, min(rank, rb.shape[0], ra.shape[0]))
        return _same_signs(qb @ u, s, vt @ qa.T)


def on_grid(values: Tensor) -> Tensor:
    """Float32 multiples of 2^-20: a difference in the last bits of a float64 hardly ever shows."""
    return values.div(GRID).round().mul(GRID).float()


def _signed(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return _same_signs(u[:, :rank], s[:rank], vt[:rank])


def _same_signs(u: Tensor, s: Tensor, vt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest entry of every column of U is positive."""
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return u * signs, s, vt * signs.T
