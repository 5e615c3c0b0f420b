"""Small arithmetic of block scales."""

from functools import lru_cache

import numpy as np

from kilotune.codec._frame import Shapes, in_name_order, numel, table_checksum


def round_up_fp16(values: np.ndarray) -> np.ndarray:
    """The smallest fp16 number that is not below each value (float64, at most 32768)."""
    nearest = values.astype(np.float16)
    return np.where(nearest < values, np.nextafter(nearest, np.float16(np.inf)), nearest).astype(np.float16)


def block_peaks(values: np.ndarray, block: int) -> np.ndarray:
    """(blocks,) float64: the largest magnitude in each block of (n,) values."""
    return np.maximum.reduceat(np.abs(values), np.arange(0, values.size, block)) if values.size else np.empty(0)


def block_counts(shapes: dict[str, tuple[int, ...]], block: int) -> list[int]:
    """Blocks of each tensor."""
    return [-(-numel(shape) // block) for shape in shapes.values()]


@lru_cache(maxsize=8)
def layout(table: tuple[tuple[str, tuple[int, ...]], ...], block: int) -> tuple[Shapes, list[int], int, int]:
    """Shapes in name order, blocks of each, numbers in all, checksum: the same for every payload of a run."""
    shapes = in_name_order(dict(table))
    return shapes, block_counts(shapes, block), sum(map(numel, shapes.values())), table_checksum(shapes)


def signed(root: int) -> int:
    """A 64-bit root as two's complement, the form in which a tensor can hold it."""
    return root - 2**64 if root >= 2**63 else root
