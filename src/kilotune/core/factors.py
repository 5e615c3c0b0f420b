"""Factor pairs: a low-rank matrix B A as two tensors, B (out, r) and A (r, in), which are named alike.

The names are those of peft's LoRA: where A's name has `.lora_A.`, B's has `.lora_B.`. *Component* k of a pair is
column k of B times row k of A.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from kilotune.core.machine_code import machine_code

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from torch import Tensor

A, B = ".lora_A.", ".lora_B."


def factor_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """(name of B, name of A) of every pair among the names, in order of A's names."""
    known = set(names)
    return [(name.replace(A, B), name) for name in sorted(known) if A in name and name.replace(A, B) in known]


def component_axes(names: Iterable[str]) -> dict[str, int]:
    """The axis of each factor along which its components lie; tensors that belong to no pair are left out."""
    return {name: axis for pair in factor_pairs(names) for name, axis in zip(pair, (1, 0), strict=True)}


def resized(factor: Tensor, axis: int, rank: int) -> Tensor:
    """The first `rank` components, zeros where there are fewer; memory of its own."""
    shape = list(factor.shape)
    shape[axis] = rank
    out = factor.new_zeros(shape)
    kept = min(rank, factor.shape[axis])
    out.narrow(axis, 0, kept).copy_(factor.narrow(axis, 0, kept))
    return out


def used_rank(tensors: Mapping[str, Tensor]) -> int:
    """Components up to the last one that is not zero in every pair, at least 1."""
    used = 1
    for b, a in factor_pairs(tensors):
        alive = tensors[b].ne(0).any(0) & tensors[a].ne(0).any(1)
        used = max(used, int(alive.nonzero().max()) + 1 if alive.any() else 0)
    return used


def with_product(weight: Tensor, b: Tensor, a: Tensor, scale: float) -> Tensor:
    """weight + scale · b a, float32 in new memory, with the same bits on every machine.

    Element (i, j) is weight[i, j] + t_0 + t_1 + … in this order, t_k = (scale · b[i, k]) · a[k, j]; each product and
    each sum is rounded to float32.
    """
    out = weight.detach().float().contiguous().clone()
    factor = b.detach().float().mul(scale).contiguous()
    _compiled()(out.numpy(), factor.numpy(), a.detach().float().contiguous().numpy())
    return out


def add_products(out: np.ndarray, b: np.ndarray, a: np.ndarray) -> None:
    """out += b a, component after component."""
    for i in range(out.shape[0]):
        for k in range(b.shape[1]):
            factor = b[i, k]
            for j in range(out.shape[1]):
                out[i, j] += factor * a[k, j]


@cache
def _compiled() -> Callable[..., Any]:
    return machine_code(add_products)
