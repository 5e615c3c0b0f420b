"""The compiled loop of decoding: one pass over the numbers of a payload instead of one for each check and product."""

from collections.abc import Callable
from functools import cache

import numpy as np

from kilotune.core.machine_code import machine_code

LARGEST = float(np.finfo(np.float32).max)
Dequantize = Callable[[np.ndarray, np.ndarray, int, int, np.ndarray], bool]


def dequantize(numbers: np.ndarray, steps: np.ndarray, block: int, limit: int, out: np.ndarray) -> bool:
    """out = number · step of its block, exact in float64 and rounded once to float32.

    False when a number is beyond the limit or a product is not finite.
    """
    wrong = 0
    for b in range(steps.size):
        step, first = steps[b], b * block
        for i in range(min(block, numbers.size - first)):
            number = np.float64(numbers[first + i])
            product = number * step
            wrong += (0 if abs(number) <= limit else 1) + (0 if abs(product) <= LARGEST else 1)
            out[first + i] = product
    return bool(wrong == 0)


@cache
def compiled() -> Dequantize:
    """`dequantize` as machine code."""
    return machine_code(dequantize, error_model="numpy")
