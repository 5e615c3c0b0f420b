"""The compiled loop of decoding: one pass over the numbers of a payload instead of one for each check and product."""

from collections.abc import Callable
from functools import cache

import numpy as np

from kilotune.core.machine_code import machine_code

LARGEST = float(np.finfo(np.float32).max)
Dequantize = Callable[[np.ndarray, np.ndarray, int, int, np.ndarray], bool]


def dequantize(numbers: np.ndarray, steps: np.ndarray, block: int, limit: int, out: np.ndarray) -> bool:
    """out = number · step of its block, exact in float64 and rounded once to float32.

    False when a step is negative or no number, a number is beyond the limit or a product is not finite.
    """
    good = True
    for b in range(steps.size):
        step = steps[b]
        good &= step >= 0
        # Slices: an index into the whole could be negative for all the compiler knows, and numbers would go one by one.
        part, made = numbers[b * block : (b + 1) * block], out[b * block : (b + 1) * block]
        for i in range(part.size):
            number = np.float64(part[i])
            product = number * step
            good &= (abs(number) <= limit) & (abs(product) <= LARGEST)
            made[i] = product
    return bool(good)


@cache
def compiled() -> Dequantize:
    """`dequantize` as machine code."""
    return machine_code(dequantize, error_model="numpy")
