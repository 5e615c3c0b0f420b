"""Shared by the bases: tensors as flat NumPy views, and pairs summed so that their order leaves no trace."""

import numpy as np
from torch import Tensor, float32

from kilotune.core.errors import WireError
from kilotune.core.types import SeedUpdate


def flat(tensor: Tensor, where: str) -> np.ndarray:
    """A flat view (no copy) of a contiguous float32 CPU tensor."""
    if tensor.dtype != float32 or not tensor.is_contiguous() or tensor.device.type != "cpu":
        layout = "contiguous" if tensor.is_contiguous() else "strided"
        raise TypeError(
            f"{where}: got a {layout} {tensor.dtype} tensor on {tensor.device}, expected contiguous float32 on cpu. "
            "Convert it with .float().contiguous() first."
        )
    array: np.ndarray = tensor.detach().view(-1).numpy()
    return array


def flat_out(weight: Tensor, out: Tensor | None, where: str) -> tuple[Tensor, np.ndarray]:
    """The tensor to write to and its flat view."""
    target = weight if out is None else out
    if target.shape != weight.shape:
        raise TypeError(f"{where}: got out of shape {tuple(target.shape)}, expected {tuple(weight.shape)}.")
    return target, flat(target, where)


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
