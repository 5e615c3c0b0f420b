"""The noise and its sums in plain NumPy: slow, obvious, and equal to `kernels` bit for bit.

Written from docs/wire.md, without the compiled loops; the tests compare the two. Nothing in a run uses this.
"""

from collections.abc import Sequence

import numpy as np

from kilotune.core import _spec as spec

Key = tuple[int, int]


def words(key: Key, first: int, count: int) -> np.ndarray:
    """(count,) uint64: words first .. first+count-1 of a stream."""
    u = np.uint64
    x = u(key[0]) + np.arange(first + 1, first + count + 1, dtype=u) * u(spec.GAMMA)
    for shift, multiplier in ((30, spec.M1), (27, spec.M2)):
        x = (x ^ (x >> u(shift))) * u(multiplier)
    x = x ^ (x >> u(31)) ^ u(key[1])
    for multiplier in (spec.M3, spec.M4):
        x = (x ^ (x >> u(33))) * u(multiplier)
    return x ^ (x >> u(33))


def horner(r: np.ndarray, coefficients: Sequence[float]) -> np.ndarray:
    """Polynomial with the constant term first, from the highest power down."""
    value = np.full_like(r, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * r + coefficient
    return value


def log(p: np.ndarray) -> np.ndarray:
    """ln p of positive normal float64 numbers, from exponent bits and an atanh series."""
    half, exponent = np.frexp(p)  # p = half * 2^exponent, 1/2 <= half < 1
    m, e = 2.0 * half, exponent - 1.0
    high = m > spec.SQRT2
    m, e = np.where(high, m * 0.5, m), np.where(high, e + 1.0, e)
    s = (m - 1.0) / (m + 1.0)
    return e * spec.LN2 + (2.0 * s) * horner(s * s, spec.ATANH)


def normal_quantile(q: np.ndarray) -> np.ndarray:
    """float64 inverse of the normal distribution at p = q + 1/2, -1/2 < q < 1/2: AS 241 without its far tail."""
    r = 0.180625 - q * q
    value = q * horner(r, spec.CENTRAL_NUM) / horner(r, spec.CENTRAL_DEN)
    outer = np.abs(q) > 0.425
    t = np.sqrt(-log(0.5 - np.abs(q[outer])))
    tail = horner(t - 1.6, spec.TAIL_NUM) / horner(t - 1.6, spec.TAIL_DEN)
    value[outer] = np.copysign(tail, q[outer])
    return value


def fill(law: str, key: Key, start: int, count: int) -> np.ndarray:
    """(count,) float32: the noise of docs/wire.md, one element at a time."""
    if law == "sign":
        element = np.arange(start, start + count, dtype=np.uint64)
        first = start >> 6
        word = words(key, first, ((start + count + 63) >> 6) - first)[(element >> np.uint64(6)) - np.uint64(first)]
        bit = (word >> (element & np.uint64(63))) & np.uint64(1)
        return (1 - 2 * bit.astype(np.int64)).astype(np.float32)
    word = words(key, start, count)
    if law == "uniform":
        n = (word >> np.uint64(40)).astype(np.int64)
        return ((2 * n + 1).astype(np.float64) * 2.0**-24 - 1.0).astype(np.float32)
    n = (word >> np.uint64(12)).astype(np.float64)
    return normal_quantile((n + 0.5) * 2.0**-52 - 0.5).astype(np.float32)


def unit(law: str, key: Key, count: int) -> np.ndarray:
    """(count,) float32 noise of variance 1."""
    z = fill(law, key, 0, count)
    return spec.SQRT3 * z if law == "uniform" else z


def widen(values: np.ndarray, scales: np.ndarray | None = None) -> np.ndarray:
    """float32 of stored weights: uint16 are the bits of bf16, int8 are multiplied by their scale, rounded once."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) * np.uint32(1 << 16)).view(np.float32)
    if scales is not None:
        return values.astype(np.float32) * np.repeat(scales, values.size // scales.size)
    return values.astype(np.float32)


def round_bf16(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest bf16 number, the even one of two equally near; not for NaN."""
    bits = x.view(np.uint32)
    below = bits & np.uint32(0xFFFF0000)
    rest, odd = bits - below, (bits >> np.uint32(16)) & np.uint32(1)
    up = (rest > 0x8000) | ((rest == 0x8000) & (odd == 1))
    return ((below >> np.uint32(16)) + up).astype(np.uint16)


def fwht(a: np.ndarray) -> np.ndarray:
    """Walsh-Hadamard transform in natural order, float32 butterflies over strides 1, 2, 4, ..."""
    u = a.astype(np.float32)
    half = 1
    while half < u.size:
        x, y = u.reshape(-1, 2, half).transpose(1, 0, 2)
        u = np.stack([x + y, x - y], axis=1).reshape(-1)
        half *= 2
    return u


def tiled_add(weight: np.ndarray, steps: Sequence[tuple[Key, np.ndarray]]) -> np.ndarray:
    """weight + s * u[i mod M], step after step in float32."""
    out = weight.copy()
    for key, u in steps:
        out = out + fill("sign", key, 0, out.size) * np.resize(u, out.size)
    return out


def running_sum(rows: np.ndarray) -> np.ndarray:
    """Sum over the first axis, strictly one row after the other from 0 (NumPy's own sum may pair them)."""
    total = np.zeros(rows.shape[1:], np.float64)
    for row in rows:
        total = total + row
    return total


def lane_sum(values: np.ndarray, lanes: int, chunk: int) -> np.ndarray:
    """(lanes,) float64: sums of every lanes-th number in chunks, then over the chunks in order."""
    padded = np.zeros(-(-values.size // chunk) * chunk)
    padded[: values.size] = values
    return running_sum(np.array([running_sum(part.reshape(-1, lanes)) for part in padded.reshape(-1, chunk)]))


def tiled_project(g: np.ndarray, key: Key, size: int) -> np.ndarray:
    """(size,) float32: v[j] = sum of s[i] * g[i] over i = j mod size."""
    signed = g.astype(np.float64) * fill("sign", key, 0, g.size)
    total = lane_sum(signed, max(size, spec.LANES), max(size, spec.PROJECT_CHUNK))
    return running_sum(total.reshape(-1, size)).astype(np.float32)


def seeds_add(weight: np.ndarray, law: str, keys: Sequence[Key], coefs: np.ndarray) -> np.ndarray:
    """weight + (sum of coefs[k] * z_k in float32, from 0, in order)."""
    total = np.zeros_like(weight)
    for key, coef in zip(keys, coefs.astype(np.float32), strict=True):
        total = total + coef * unit(law, key, weight.size)
    return weight + total


def dot(a: np.ndarray, b: np.ndarray) -> float:
    """Inner product of two float32 arrays: 64 float64 lanes per chunk, lanes then chunks in order."""
    padded = np.zeros(-(-a.size // spec.CHUNK) * spec.CHUNK)
    padded[: a.size] = a.astype(np.float64) * b.astype(np.float64)
    lanes = [running_sum(part.reshape(-1, spec.LANES)) for part in padded.reshape(-1, spec.CHUNK)]
    return float(running_sum(np.array([running_sum(row) for row in lanes])))


def seeds_project(g: np.ndarray, law: str, keys: Sequence[Key]) -> np.ndarray:
    """(len(keys),) float32: inner products of g with every direction."""
    return np.array([dot(unit(law, key, g.size), g) for key in keys], dtype=np.float32)


def rms(weight: np.ndarray) -> float:
    """Root mean square rounded to float32, at least 1e-4."""
    return max(float(np.float32(np.sqrt(dot(weight, weight) / max(weight.size, 1)))), spec.RMS_FLOOR)
