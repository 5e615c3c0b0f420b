"""What payloads share whose pairs have a rank each: the modules of a table, and where their first components lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kilotune.codec import Codec, TensorUpdate
from kilotune.codec._frame import Shapes, in_name_order
from kilotune.codec._vector import plain
from kilotune.core.factors import component_axes, factor_pairs, resized

if TYPE_CHECKING:
    from torch import Tensor

Modules = list[tuple[tuple[str, ...], int]]
"""(B, A) of a pair or one tensor without a partner, and how many components it has."""


def fixed_length(codec: Codec) -> Codec:
    """For fields that hold a codec. Raises ValueError unless its payloads' length is known beforehand."""
    if not plain(codec).exact:
        raise ValueError("a codec whose length is known beforehand: dense, quantized, sign or gaussian")
    return codec


def modules(shapes: Shapes) -> Modules:
    """In the order in which their counts travel: pairs by A's name, then the others by name."""
    pairs = factor_pairs(shapes)
    alone = sorted(set(shapes).difference(*pairs))
    return [(pair, shapes[pair[1]][0]) for pair in pairs] + [((name,), 1) for name in alone]


def num_modules(names: dict[str, int]) -> int:
    """How many `modules` a table of these names has."""
    return len(names) - len(factor_pairs(names))


def filled(update: TensorUpdate, shapes: Shapes) -> dict[str, Tensor]:
    """The tensors in a new table, pairs of fewer components with zeros behind them."""
    axes, tensors = component_axes(shapes), dict(update.tensors)
    for name, axis in axes.items():
        if name in tensors and tensors[name].shape[axis] < shapes[name][axis]:
            tensors[name] = resized(tensors[name], axis, shapes[name][axis])
    return tensors


def places(shapes: Shapes, counts: np.ndarray) -> np.ndarray:
    """(n,) bool over all numbers, tensors by name: those of the first components of every module."""
    axes = component_axes(shapes)
    first = {name: n for (names, _), n in zip(modules(shapes), counts.tolist(), strict=True) for name in names}
    parts = []
    for name, shape in in_name_order(shapes).items():
        kept = np.arange(shape[axes[name]]) < first[name] if name in axes else np.array(first[name] > 0)
        parts.append(np.broadcast_to(kept[:, None] if axes.get(name) == 0 else kept, shape).reshape(-1))
    return np.concatenate(parts)
