"""Noise and weights at memory speed: add directions to a tensor, project a gradient on them, rms, Walsh-Hadamard.

docs/wire.md defines every value to the bit; `kilotune.core.reference` says the same in plain NumPy and
the tests hold both equal. Threads take whole chunks of a fixed size and their partial sums are added in
the order of the chunks, so the number of threads never changes a bit.
All arrays are flat and contiguous; a key is the pair (k0, k1) of `noise.stream_key`. Weights are float32, or
`Stored` in fewer bytes and only read: a chunk is widened while it is in cache, never the whole. What is written
is float32, or uint16 for bf16, rounded to nearest (ties to even) once, after the last addition.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from kilotune.core import _loops
from kilotune.core._spec import CHUNK, LANES, LAWS, PROJECT_CHUNK, RMS_FLOOR

Key = tuple[int, int]
T = TypeVar("T")

_SPAN = 1 << 20  # elements times directions a thread takes at once: some milliseconds of work
_TILED_SPAN = 4  # chunks of tiled_add a thread takes at once: fewer cost more to hand over than they take
_STEP_FLOATS = 1 << 22  # coordinates held for one pass of tiled_add; more steps make more passes
_ROWS = 64  # steps over one pool of seeds whose sums a thread keeps at a time, in its cache
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


class Stored(NamedTuple):
    """Weights in fewer bytes, in memory or in a mapped file: uint16 (bits of bf16), float16, or int8 with scales."""

    values: np.ndarray
    scales: np.ndarray | None = None  # (n,) float32, one for every values.size / n values of int8

    @property
    def size(self) -> int:
        return self.values.size

    def load(self, begin: int, out: np.ndarray) -> None:
        """out <- values begin, begin+1, ... as float32."""
        part = self.values[begin : begin + out.size]
        if self.scales is not None:
            _loops.load_int8(self.values, self.scales, self.size // self.scales.size, begin, out)
        elif part.dtype == np.float16:
            _loops.load_fp16(part.view(np.uint16), out)
        else:
            _loops.load_bf16(part, out)


Weight = np.ndarray | Stored
Outs = tuple[np.ndarray, np.ndarray]

_NONE = np.empty(0, np.float32)


def _walk(loop: Callable[..., None], weight: Weight, outs: Outs, start: int, length: int, per_span: int) -> None:
    """loop(source, plus, minus, start, first, last) over all of `outs`, which it reads and writes as float32.

    An empty source says that they hold the weights already. Other kinds of weights and results pass through
    float32 chunk by chunk, while a chunk is in cache.
    """
    if isinstance(weight, np.ndarray) and outs[0].dtype == np.float32:
        source = _NONE if weight.ctypes.data == outs[0].ctypes.data else weight
        work = partial(loop, source, *outs, start)
        _finish(_spans(work, _count(start, outs[0].size, length), per_span))
        return
    converted = partial(_convert, loop, weight, outs, start, length)
    _finish(_spans(converted, _count(start, outs[0].size, CHUNK), max(1, per_span * length // CHUNK)))


def _convert(
    loop: Callable[..., None], weight: Weight, outs: Outs, start: int, length: int, first: int, last: int
) -> None:
    several = outs[:1] if outs[0] is outs[1] else outs
    scratch = [np.empty(0 if out.dtype == np.float32 else CHUNK, np.float32) for out in several]
    for chunk in range(first, last):
        begin = max(chunk * CHUNK - (start & 63), 0)
        end = min((chunk + 1) * CHUNK - (start & 63), outs[0].size)
        parts = [
            room[: end - begin] if room.size else out[begin:end] for out, room in zip(several, scratch, strict=True)
        ]
        for part in parts:
            if isinstance(weight, Stored):
                weight.load(begin, part)
            else:
                part[:] = weight[begin:end]
        loop(_NONE, parts[0], parts[-1], start + begin, 0, _count(start + begin, end - begin, length))
        for part, out, room in zip(parts, several, scratch, strict=True):
            if room.size:
                _loops.store_bf16(part, out[begin:end])


def _count(start: int, size: int, length: int) -> int:
    """Spans of `length` elements of the full tensor that a slice of `size` elements from `start` on reaches into."""
    return -(-((start & 63) + size) // length)


def tiled_add(weight: Weight, out: np.ndarray, steps: Sequence[tuple[Key, np.ndarray]], start: int = 0) -> None:
    """out = weight, then out[i] += s[start+i] * u[(start+i) mod M] for each step (key of the signs s, u (M,)).

    M is a power of two. Every addition is rounded to float32, in the order of the steps. One pass over memory for
    any usual number of steps. `out` may be `weight`; otherwise they must not overlap.
    """
    group = max(1, _STEP_FLOATS // _tile(steps[0][1]).size) if steps and out.dtype == np.float32 else len(steps) or 1
    for at in range(0, max(len(steps), 1), group):
        some = steps[at : at + group]
        us = np.stack([_tile(u) for _, u in some]) if some else np.empty((0, LANES), np.float32)
        _tiled_add(weight, (out, out), [key for key, _ in some], us[None], start)
        weight = out


def tiled_both(
    weight: Weight, plus: np.ndarray, minus: np.ndarray, key: Key, us: tuple[np.ndarray, np.ndarray], start: int = 0
) -> None:
    """tiled_add of us[0] into `plus` and of us[1] into `minus`, in one pass over weight and signs. None may overlap."""
    both = np.empty((2, 1, max(us[0].size, LANES)), np.float32)
    both[0, 0], both[1, 0] = _tile(us[0]), _tile(us[1])
    _tiled_add(weight, (plus, minus), [key], both, start)


def _tiled_add(weight: Weight, outs: Outs, keys: Sequence[Key], us: np.ndarray, start: int) -> None:
    pairs = _keys(keys)

    def loop(source: np.ndarray, plus: np.ndarray, minus: np.ndarray, at: int, first: int, last: int) -> None:
        _loops.tiled_add(source, plus, minus, pairs, us, at, first, last)

    _walk(loop, weight, outs, start, CHUNK, _TILED_SPAN)


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


def seeds_add(
    weight: Weight, out: np.ndarray, law: str, steps: Sequence[tuple[Sequence[Key], np.ndarray]], start: int = 0
) -> None:
    """Per (keys, coefs): out += sum over k of coefs[k] * z_k, z_k the unit-variance noise of keys[k].

    The sum is float32 from 0 in the order given, each product rounded before it is added; then one
    addition to the weight. `out` may be `weight`; otherwise they must not overlap. coefs of several rows are as
    many steps with the same keys, whose noise is made once.
    """
    parts = []
    for keys, coefs in steps:
        rows = np.atleast_2d(coefs)
        parts += [(keys, rows[at : at + _ROWS]) for at in range(0, len(rows), _ROWS)]
    _seeds_add(weight, (out, out), law, parts, start, both=False)


def seeds_both(
    weight: Weight,
    plus: np.ndarray,
    minus: np.ndarray,
    law: str,
    keys: Sequence[Key],
    coefs: np.ndarray,
    start: int = 0,
) -> None:
    """seeds_add of coefs[0] into `plus` and of coefs[1] into `minus`; all noise is made once. None may overlap."""
    _seeds_add(weight, (plus, minus), law, [(keys, coefs)], start, both=True)


def _seeds_add(
    weight: Weight,
    outs: Outs,
    law: str,
    parts: Sequence[tuple[Sequence[Key], np.ndarray]],
    start: int,
    both: bool,
) -> None:
    pairs = _keys([key for keys, _ in parts for key in keys])
    coefs = np.zeros((max((len(rows) for _, rows in parts), default=1), len(pairs)), np.float32)
    groups, at = np.zeros((len(parts), 3), np.int64), 0
    for group, (keys, rows) in enumerate(parts):
        groups[group] = at, at + len(keys), len(rows)
        coefs[: len(rows), at : at + len(keys)] = rows
        at += len(keys)
    law_code, per_span = LAWS.index(law), max(1, _SPAN // (_loops.BLOCK * max(len(pairs), 1)))

    def loop(source: np.ndarray, plus: np.ndarray, minus: np.ndarray, at: int, first: int, last: int) -> None:
        _loops.seeds_add(source, plus, minus, both, law_code, pairs, coefs, groups, at, first, last)

    _walk(loop, weight, outs, start, _loops.BLOCK, per_span)


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
    """Root mean square of an array, a CPU tensor or `Stored` weights, rounded to float32; at least 1e-4.

    The floor lets tensors of zeros move. Squares are summed in float64 as in `seeds_project`; NaN stays NaN.
    """
    source = weight if isinstance(weight, Stored) else np.ascontiguousarray(weight, dtype=np.float32).reshape(-1)

    def work(first: int, last: int) -> np.ndarray:
        if not isinstance(source, Stored):
            rows: np.ndarray = _loops.squares(source, first, last)
            return rows
        parts, x = [], np.empty(CHUNK, np.float32)
        for chunk in range(first, last):
            part = x[: min(CHUNK, source.size - chunk * CHUNK)]
            source.load(chunk * CHUNK, part)
            parts.append(_loops.squares(part, 0, 1))
        return np.concatenate(parts)

    total = 0.0
    for rows in _spans(work, -(-source.size // CHUNK), _SPAN // CHUNK):
        for row in rows:
            total += row[0]
    value = float(np.float32(np.sqrt(total / max(source.size, 1))))
    return RMS_FLOOR if value < RMS_FLOOR else value
