"""Noise and weights at memory speed: add directions to a tensor, project a gradient on them, rms, Walsh-Hadamard.

docs/wire.md defines every value to the bit; `kilotune.core.reference` says the same in plain NumPy and
the tests hold both equal. Threads take whole chunks of a fixed size and their partial sums are added in
the order of the chunks, so the number of threads never changes a bit.
All arrays are flat, contiguous and float32; a key is the pair (k0, k1) of `noise.stream_key`.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np

from kilotune.core import _loops
from kilotune.core._spec import CHUNK, LANES, LAWS, PROJECT_CHUNK, RMS_FLOOR

Key = tuple[int, int]
T = TypeVar("T")

_SPAN = 1 << 20  # elements times directions a thread takes at once: some milliseconds of work
_STEP_FLOATS = 1 << 22  # coordinates held for one pass of tiled_add; more steps make more passes
_threads: int | None = None


def set_threads(count: int | None) -> None:
    """Use this many threads; None (the start) follows torch.get_num_threads(). Results do not depend on it."""
    global _threads
    if count is not None and count < 1:
        raise ValueError(f"kernels.set_threads: got {count}, expected at least 1. Pass None to follow torch.")
    _threads = count


def threads() -> int:
    """Threads in use now."""
    if _threads is not None:
        return _threads
    import torch

    return torch.get_num_threads()


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="kilotune-kernel")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has the pools but not their threads


def _spans(work: Callable[[int, int], T], count: int, per_span: int) -> Iterator[T]:
    """work(first, last) over consecutive spans of range(count), results in order."""
    bounds = [(first, min(first + per_span, count)) for first in range(0, count, max(per_span, 1))]
    if threads() == 1 or len(bounds) == 1:
        return (work(first, last) for first, last in bounds)
    return _pool(threads()).map(lambda bound: work(*bound), bounds)


def _finish(results: Iterator[None]) -> None:
    for _ in results:
        pass


def _keys(keys: Sequence[Key]) -> np.ndarray:
    return np.array(keys, dtype=np.uint64).reshape(-1, 2)


def fill(law: str, key: Key, start: int, count: int) -> np.ndarray:
    """(count,) float32: elements start .. start+count-1 of one noise stream."""
    out = np.empty(count, np.float32)
    _loops.fill(LAWS.index(law), np.uint64(key[0]), np.uint64(key[1]), start, out)
    return out


def fwht(a: np.ndarray) -> np.ndarray:
    """u[j] = sum over k of a[k] * (-1)^popcount(k & j), (M,) float32, M a power of two.

    Butterflies (x + y, x - y) over strides 1, 2, 4, ..., each rounded to float32. `a` is left as it is.
    """
    if a.size < 1 or a.size & (a.size - 1):
        raise ValueError(f"kernels.fwht: got {a.size} numbers, expected a power of two.")
    out = np.array(a, dtype=np.float32)
    _loops.fwht(out)
    return out


def _tile(u: np.ndarray) -> np.ndarray:
    """The same period, but of at least 64 elements."""
    return np.tile(u, LANES // u.size) if u.size < LANES else u


def tiled_add(weight: np.ndarray, out: np.ndarray, steps: Sequence[tuple[Key, np.ndarray]]) -> None:
    """out = weight, then out[i] += s[i] * u[i mod M] for each step (key of the signs s, u (M,)), M a power of two.

    Every addition is rounded to float32, in the order of the steps. One pass over memory for any usual
    number of steps. `out` may be `weight`; otherwise they must not overlap.
    """
    copy = out.ctypes.data != weight.ctypes.data
    if not steps and copy:
        out[:] = weight
    group = max(1, _STEP_FLOATS // _tile(steps[0][1]).size) if steps else 1
    for at in range(0, len(steps), group):
        some = steps[at : at + group]
        keys, us = _keys([key for key, _ in some]), np.stack([_tile(u) for _, u in some])
        work = partial(_loops.tiled_add, weight, out, copy, keys, us)
        _finish(_spans(work, -(-out.size // CHUNK), _SPAN // CHUNK))
        copy = False


def tiled_project(g: np.ndarray, key: Key, size: int) -> np.ndarray:
    """(size,) float32: v[j] = sum of s[i] * g[i] over i = j mod size, `size` a power of two.

    float64 sums per chunk of max(2^20, size) elements, in rising i; chunks added in order in float64;
    for size < 64 the 64 lanes are folded in rising order; one rounding to float32 at the end.
    """
    period, chunk = max(size, LANES), max(size, PROJECT_CHUNK)
    keys = _keys([key])
    total = np.zeros(period, np.float64)
    work = partial(_loops.tiled_project, g, keys, period, chunk)
    for rows in _spans(work, -(-g.size // chunk), 1):
        for row in rows:
            total += row
    folded = np.zeros(size, np.float64)
    for part in total.reshape(-1, size):
        folded += part
    return folded.astype(np.float32)


def seeds_add(weight: np.ndarray, out: np.ndarray, law: str, keys: Sequence[Key], coefs: np.ndarray) -> None:
    """out = weight + sum over k of coefs[k] * z_k, z_k the unit-variance noise of keys[k].

    The sum is float32 from 0 in the order given, each product rounded before it is added; then one
    addition to the weight. `out` may be `weight`; otherwise they must not overlap.
    """
    code, pairs, scalars = LAWS.index(law), _keys(keys), np.ascontiguousarray(coefs, dtype=np.float32)
    blocks = -(-out.size // _loops.BLOCK)
    per_span = max(1, _SPAN // (_loops.BLOCK * max(len(keys), 1)))
    work = partial(_loops.seeds_add, weight, out, code, pairs, scalars)
    _finish(_spans(work, blocks, per_span))


def seeds_project(g: np.ndarray, law: str, keys: Sequence[Key]) -> np.ndarray:
    """(len(keys),) float32: inner products of g with the unit-variance noise of every key, one pass over g.

    float64 sums in 64 lanes (element i in lane i mod 64) per chunk of 2^16 elements; lanes, then chunks,
    added in order; one rounding to float32 at the end.
    """
    code, pairs = LAWS.index(law), _keys(keys)
    total = np.zeros(len(keys), np.float64)
    per_span = max(1, _SPAN // (CHUNK * max(len(keys), 1)))
    work = partial(_loops.seeds_project, g, code, pairs)
    for rows in _spans(work, -(-g.size // CHUNK), per_span):
        for row in rows:
            total += row
    return total.astype(np.float32)


def rms(weight: Any) -> float:
    """Root mean square of an array or CPU tensor, rounded to float32, at least 1e-4 so that zero tensors can move.

    Squares are summed in float64 like the products of `seeds_project`; NaN stays NaN.
    """
    flat = np.ascontiguousarray(weight, dtype=np.float32).reshape(-1)
    total = 0.0
    for rows in _spans(partial(_loops.squares, flat), -(-flat.size // CHUNK), _SPAN // CHUNK):
        for row in rows:
            total += row[0]
    value = float(np.float32(np.sqrt(total / max(flat.size, 1))))
    return RMS_FLOOR if value < RMS_FLOOR else value
