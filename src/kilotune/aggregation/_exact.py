"""Exact sums: what float64 additions round off is kept and added up too, so that no order changes a bit.

Source: the error-free addition of Knuth, "The Art of Computer Programming", volume 2, section 4.2.2, theorem B.
Memory: one float64 per number for terms on a common grid, as quantized updates are; one more per number for each
53 bits by which the terms lie further apart.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np

from kilotune.core.machine_code import machine_code

SLICE = 2**16  # numbers worked on at once: they stay in cache
Add = Callable[[np.ndarray, np.ndarray, float, np.ndarray], bool]


class ExactSum:
    """Σ weight · values of any number of vectors; the vectors themselves are not kept."""

    def __init__(self, size: int) -> None:
        self._levels = [np.zeros(size)]  # each holds what the additions into the one before it rounded off
        self._add = compiled()

    def add(self, values: np.ndarray, weight: float) -> None:
        """One vector (n,) float32; its terms weight · value are rounded to float64 if they do not fit."""
        for start in range(0, values.size, SLICE):
            here = slice(start, start + SLICE)
            terms, factor, depth = values[here], weight, 0
            rest = np.empty(terms.size)
            while self._add(self._levels[depth][here], terms, factor, rest):
                terms, factor, depth = rest, 1.0, depth + 1
                if depth == len(self._levels):
                    self._levels.append(np.zeros(values.size))

    def total(self) -> np.ndarray:
        """(n,) float64: the exact sum, rounded once."""
        first, *others = self._levels
        if not others:
            return first.copy()
        total = first + others[0]
        deep = np.flatnonzero(np.any(others[1:], axis=0)) if others[1:] else ()
        for i in deep:  # terms more than 2^53 apart that all matter: hardly ever
            total[i] = math.fsum(level[i] for level in self._levels)
        return total


def add_exactly(total: np.ndarray, values: np.ndarray, weight: float, rest: np.ndarray) -> bool:
    """total += weight · values; `rest` is what was rounded off. False when that is nothing."""
    lost_any = False
    for i in range(total.size):
        old, term = total[i], weight * np.float64(values[i])
        rounded = old + term
        back = rounded - old
        lost = (old - (rounded - back)) + (term - back)
        total[i], rest[i] = rounded, lost
        lost_any |= abs(lost) > 0.0  # NaN, of a sum that is not finite any more, is not: adding it up would never end
    return lost_any


@cache
def compiled() -> Add:
    """`add_exactly` as machine code."""
    return machine_code(add_exactly)
