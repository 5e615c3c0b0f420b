"""Shared by the bases: tensors as flat NumPy views, and pairs summed so that their order leaves no trace."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from kilotune.core.errors import WireError
from kilotune.core.int8 import Int8
from kilotune.core.lazy import torch
from kilotune.core.types import SeedUpdate

if TYPE_CHECKING:
    from torch import Tensor

if TYPE_CHECKING:
    from kilotune.core import kernels  # loads numba: only when noise is really made


@cache
def _bits() -> dict[Any, Any]:
    return {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.float16, torch.int8: np.int8}


def flat(tensor: Tensor, where: str, *others: torch.dtype) -> np.ndarray:
    """A flat view (no copy) of a contiguous float32 CPU tensor, or of one of the `others`; bf16 as its bits."""
    if tensor.dtype == torch.float32 and tensor.is_cpu and tensor.is_contiguous() and not tensor.requires_grad:
        whole: np.ndarray = tensor.numpy()  # the usual case, hundreds of times in a step: no views, no strings
        return whole.reshape(-1)
    if tensor.dtype not in (torch.float32, *others) or not tensor.is_contiguous() or tensor.device.type != "cpu":
        layout = "contiguous" if tensor.is_contiguous() else "strided"
        raise TypeError(
            f"{where}: got a {layout} {tensor.dtype} tensor on {tensor.device}, expected contiguous float32 on cpu. "
            "Convert it with .float().contiguous() first."
        )
    tensor = tensor.detach().view(-1)
    array: np.ndarray = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array.view(_bits()[tensor.dtype])


def flat_weight(weight: Tensor | Int8, where: str) -> kernels.Weight:
    """Weights of any kind that can be read."""
    from kilotune.core import kernels

    if isinstance(weight, Int8):
        return kernels.Stored(flat(weight.values, where, torch.int8), flat(weight.scales, where))
    values = flat(weight, where, torch.bfloat16, torch.float16)
    return values if values.dtype == np.float32 else kernels.Stored(values)


def flat_out(weight: Tensor | Int8, out: Tensor | None, where: str) -> tuple[Tensor, np.ndarray]:
    """The tensor to write to, float32 or a bf16 one given as `out`, and its flat view."""
    if out is None:
        if isinstance(weight, Int8):
            raise TypeError(f"{where}: int8 weights are only read. Give a float32 or bfloat16 tensor as out.")
        return weight, flat(weight, where)
    if out.shape != weight.shape:
        raise TypeError(f"{where}: got out of shape {tuple(out.shape)}, expected {tuple(weight.shape)}.")
    return out, flat(out, where, torch.bfloat16)


def check_start(start: int, where: str) -> None:
    """Refuse a slice that would begin before its tensor."""
    if start < 0:
        raise ValueError(f"{where}: got start {start}, expected the place of the slice's first element, at least 0.")


def vector(coordinates: Tensor, size: int, where: str) -> np.ndarray:
    """Coordinates as (size,) float32."""
    if coordinates.shape != (size,):
        raise TypeError(f"{where}: got coordinates of shape {tuple(coordinates.shape)}, expected ({size},).")
    return flat(coordinates, where)


def check_index(index: int, size: int, where: str) -> None:
    """Refuse a direction that the basis does not have."""
    if not 0 <= index < size:
        raise WireError(f"{where}: got direction {index}, expected 0 <= index < {size}. Both ends need one basis.size.")


def scatter(update: SeedUpdate, size: int, where: str) -> np.ndarray:
    """(size,) float32: the coefficients of each direction summed.

    Pairs are sorted by (index, bits of the coefficient), summed in that order in float64 and rounded
    once, so any order of the same pairs gives the same bits.
    """
    if update.groups is not None and np.unique(update.groups).size > 1:
        raise ValueError(f"{where}: got pairs of several groups, expected one. Select the pairs of one group first.")
    indices = np.asarray(update.indices, dtype=np.int64)
    coefs = np.ascontiguousarray(update.coefs, dtype=np.float32)
    if indices.size:
        check_index(int(indices.min()), size, where)
        check_index(int(indices.max()), size, where)
    order = np.lexsort((coefs.view(np.uint32), indices))
    return np.bincount(indices[order], weights=coefs[order].astype(np.float64), minlength=size).astype(np.float32)
