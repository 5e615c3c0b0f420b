"""The compiled loops behind `kernels`: every function numba compiles is here, since its cache watches one file only.

`_spec` holds the constants; docs/wire.md says in words what the values are. Rules that keep the bits: no
fast-math, and every sum in one fixed order. The inner loops run over 32 or 64 elements without a branch
so that they become vector instructions.
"""

import math
from functools import partial

import numpy as np

from kilotune.core import _spec as spec
from kilotune.core.machine_code import machine_code

BLOCK = 2048  # elements of noise generated at a time; no result depends on it

_U1 = np.uint64(1)
_S12, _S27, _S30, _S31, _S33, _S40, _S52 = (np.uint64(n) for n in (12, 27, 30, 31, 33, 40, 52))
_GAMMA, _M1, _M2, _M3, _M4 = (np.uint64(n) for n in (spec.GAMMA, spec.M1, spec.M2, spec.M3, spec.M4))
_FRACTION, _ONE_BITS = np.uint64(0x000FFFFFFFFFFFFF), np.uint64(0x3FF0000000000000)
_TOP = np.uint32(0x80000000)
_INDEX = (1 << 62) - 1  # tells the compiler that an index is not negative, without which loops stay scalar


_jit = partial(machine_code, fastmath=False, error_model="numpy")


# ---- noise ----------------------------------------------------------------------------------------


@_jit
def _word(k0, k1, j):  # type: ignore[no-untyped-def]
    """Word j of the stream: a bijection of the counter, keyed before and between two finalisers."""
    x = k0 + (j + _U1) * _GAMMA
    x = (x ^ (x >> _S30)) * _M1
    x = (x ^ (x >> _S27)) * _M2
    x = (x ^ (x >> _S31)) ^ k1
    x = (x ^ (x >> _S33)) * _M3
    x = (x ^ (x >> _S33)) * _M4
    return x ^ (x >> _S33)


@_jit
def _words(k0, k1, first, out):  # type: ignore[no-untyped-def]
    for j in range(out.size):
        out[j] = _word(k0, k1, np.uint64(first + j))


@_jit
def _fill_sign(k0, k1, start, out):  # type: ignore[no-untyped-def]
    word = np.uint64(0)
    for i in range(out.size):
        element = start + i
        if i == 0 or (element & 63) == 0:
            word = _word(k0, k1, np.uint64(element >> 6))
        out[i] = np.float32(1 - 2 * np.int64((word >> np.uint64(element & 63)) & _U1))


@_jit
def _fill_uniform(k0, k1, start, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        n = np.int64(_word(k0, k1, np.uint64(start + i)) >> _S40)
        out[i] = np.float32(2 * n + 1 - (1 << 24)) * np.float32(2.0**-24)


@_jit
def _poly7(r, c):  # type: ignore[no-untyped-def]
    return ((((((c[7] * r + c[6]) * r + c[5]) * r + c[4]) * r + c[3]) * r + c[2]) * r + c[1]) * r + c[0]


@_jit
def _poly10(r, c):  # type: ignore[no-untyped-def]
    top = ((c[10] * r + c[9]) * r + c[8]) * r + c[7]
    return ((((((top * r + c[6]) * r + c[5]) * r + c[4]) * r + c[3]) * r + c[2]) * r + c[1]) * r + c[0]


@_jit
def _sqrt_minus_log(p, scratch):  # type: ignore[no-untyped-def]
    """p <- sqrt(-ln p) in place for 0 < p < 1, from + - * / sqrt only, so that every machine agrees."""
    bits = p.view(np.uint64)
    for i in range(p.size):
        exponent = np.int64(bits[i] >> _S52) - 1023
        scratch[i] = (bits[i] & _FRACTION) | _ONE_BITS
        p[i] = np.float64(exponent)
    mantissa = scratch.view(np.float64)
    for i in range(p.size):
        m, e = mantissa[i], p[i]
        high = m > spec.SQRT2
        m, e = (m * 0.5 if high else m), (e + 1.0 if high else e)
        s = (m - 1.0) / (m + 1.0)
        p[i] = math.sqrt(-(e * spec.LN2 + (2.0 * s) * _poly10(s * s, spec.ATANH)))


@_jit
def _fill_gaussian(k0, k1, start, out):  # type: ignore[no-untyped-def]
    """The central formula for all, then the outer 15 % again, packed together so that they vectorise."""
    q = np.empty(BLOCK, np.float64)
    p = np.empty(BLOCK, np.float64)
    scratch = np.empty(BLOCK, np.uint64)
    where = np.empty(BLOCK + 1, np.uint32)  # unsigned: an index that needs no test for "from the end"
    for base in range(0, out.size, BLOCK):
        part = out[base : min(base + BLOCK, out.size)]
        _words(k0, k1, start + base, scratch[: part.size])
        for i in range(part.size):
            n = np.int64(scratch[i] >> _S12)
            q[i] = np.float64(2 * n + 1 - (1 << 52)) * 2.0**-53
        for i in range(part.size):
            r = 0.180625 - q[i] * q[i]
            part[i] = np.float32(q[i] * _poly7(r, spec.CENTRAL_NUM) / _poly7(r, spec.CENTRAL_DEN))
        count = 0
        for i in range(part.size):
            where[count] = i
            count += abs(q[i]) > 0.425
        for t in range(count):
            p[t] = 0.5 - abs(q[where[t]])
        _sqrt_minus_log(p[:count], scratch[:count])
        for t in range(count):
            r = p[t] - 1.6
            p[t] = _poly7(r, spec.TAIL_NUM) / _poly7(r, spec.TAIL_DEN)
        for t in range(count):
            part[where[t]] = np.float32(p[t] if q[where[t]] > 0.0 else -p[t])


@_jit
def fill(law, k0, k1, start, out):  # type: ignore[no-untyped-def]
    if law == spec.GAUSSIAN:
        _fill_gaussian(k0, k1, start, out)
    elif law == spec.UNIFORM:
        _fill_uniform(k0, k1, start, out)
    else:
        _fill_sign(k0, k1, start, out)


@_jit
def _fill_unit(law, k0, k1, start, out):  # type: ignore[no-untyped-def]
    fill(law, k0, k1, start, out)
    if law == spec.UNIFORM:
        for i in range(out.size):
            out[i] = spec.SQRT3 * out[i]


# ---- weights as they are stored -------------------------------------------------------------------


@_jit
def load_bf16(values, out):  # type: ignore[no-untyped-def]
    bits = out.view(np.uint32)
    for i in range(out.size):
        bits[i] = np.uint32(values[i]) << np.uint32(16)


@_jit
def load_fp16(values, out):  # type: ignore[no-untyped-def]
    bits = out.view(np.uint32)
    for i in range(out.size):
        h = np.uint32(values[i])
        rest = np.uint32((h & np.uint32(0x7FFF)) << np.uint32(13))
        usual = np.uint32(rest + np.uint32(224 << 23 if rest >= np.uint32(31 << 23) else 112 << 23))
        tiny = np.float32(np.uint32(rest + np.uint32(113 << 23)).view(np.float32) - np.float32(2.0**-14))  # exact
        value = tiny.view(np.uint32) if rest < np.uint32(1 << 23) else usual
        bits[i] = value | np.uint32((h & np.uint32(0x8000)) << np.uint32(16))


@_jit
def load_int8(values, scales, row, begin, out):  # type: ignore[no-untyped-def]
    """Values begin, begin+1, ... of a slice whose first `row` values share the first scale."""
    i = 0
    while i < out.size:
        at = (begin + i) // row
        end = min((at + 1) * row - begin, out.size)
        part, some, scale = out[i:end], values[begin + i : begin + end], scales[at]
        for j in range(part.size):
            part[j] = np.float32(some[j]) * scale
        i = end


@_jit
def store_bf16(x, out):  # type: ignore[no-untyped-def]
    """Round to nearest, ties to even; NaN stays NaN."""
    bits = x.view(np.uint32)
    for i in range(x.size):
        top = np.uint32(bits[i] >> np.uint32(16))
        rounded = np.uint32(np.uint32(bits[i] + np.uint32(0x7FFF) + np.uint32(top & np.uint32(1))) >> np.uint32(16))
        out[i] = np.uint16(rounded if x[i] == x[i] else np.uint32(top | np.uint32(0x40)))


# ---- one chunk of signs ---------------------------------------------------------------------------


@_jit
def _copy(source, out):  # type: ignore[no-untyped-def]
    """out[:] = source; written like that it compiles for seconds, since numba compiles the text of its error too."""
    for i in range(out.size):
        out[i] = source[i]


@_jit
def _add_few_signs(x, start, k0, k1, u):  # type: ignore[no-untyped-def]
    """_add_signs one element at a time, for starts and ends that are no multiple of 64."""
    for i in range(x.size):
        element = start + i
        negative = (_word(k0, k1, np.uint64(element >> 6)) >> np.uint64(element & 63)) & _U1
        value = u[element & (u.size - 1)]
        x[i] = x[i] + (-value if negative else value)


@_jit
def _add_words(x, start, u, words):  # type: ignore[no-untyped-def]
    """x[i] += u[(start+i) mod u.size], negated where bit i of `words` is set; start is a multiple of 64.

    One array that is read and written, not two: the compiler cannot tell two apart when they are the same.
    """
    bits = u.view(np.uint32)
    for w in range(x.size >> 6):
        offset = (start + 64 * w) & (u.size - 1) & _INDEX
        for h in range(2):  # 32 elements at a time: signs and floats then have the same width
            half = np.uint32((words[w] >> np.uint64(32 * h)) & np.uint64(0xFFFFFFFF))
            i, j = 64 * w + 32 * h, offset + 32 * h
            for b in range(32):
                sign = np.uint32(np.uint32(half << np.uint32(31 - b)) & _TOP)
                x[i + b] = x[i + b] + np.uint32(bits[j + b] ^ sign).view(np.float32)


@_jit
def _add_signs(x, start, k0, k1, u, words, known):  # type: ignore[no-untyped-def]
    """x[i] += s[start+i] * u[(start+i) mod u.size]; u.size is a power of two, at least 64.

    `known` says that `words` already holds what the last call for this start and key has put there.
    """
    head = min(-start & 63, x.size)
    full = (x.size - head) >> 6
    tail = head + 64 * full
    if not known:
        _words(k0, k1, (start + head) >> 6, words[:full])
    _add_few_signs(x[:head], start, k0, k1, u)
    _add_words(x[head:tail], start + head, u, words)
    _add_few_signs(x[tail:], start + tail, k0, k1, u)


@_jit
def _put_words(source, x, start, u, words):  # type: ignore[no-untyped-def]
    """_add_words to a copy, made in the same pass; the two must not overlap."""
    bits = u.view(np.uint32)
    for w in range(x.size >> 6):
        offset = (start + 64 * w) & (u.size - 1) & _INDEX
        for h in range(2):
            half = np.uint32((words[w] >> np.uint64(32 * h)) & np.uint64(0xFFFFFFFF))
            i, j = 64 * w + 32 * h, offset + 32 * h
            for b in range(32):
                sign = np.uint32(np.uint32(half << np.uint32(31 - b)) & _TOP)
                x[i + b] = source[i + b] + np.uint32(bits[j + b] ^ sign).view(np.float32)


@_jit
def _put_both_words(source, x, y, start, u, v, words):  # type: ignore[no-untyped-def]
    """_put_words into x and into y."""
    bits, others = u.view(np.uint32), v.view(np.uint32)
    for w in range(x.size >> 6):
        offset = (start + 64 * w) & (u.size - 1) & _INDEX
        for h in range(2):
            half = np.uint32((words[w] >> np.uint64(32 * h)) & np.uint64(0xFFFFFFFF))
            i, j = 64 * w + 32 * h, offset + 32 * h
            for b in range(32):
                sign = np.uint32(np.uint32(half << np.uint32(31 - b)) & _TOP)
                x[i + b] = source[i + b] + np.uint32(bits[j + b] ^ sign).view(np.float32)
                y[i + b] = source[i + b] + np.uint32(others[j + b] ^ sign).view(np.float32)


@_jit
def _put_signs(source, plus, minus, start, keys, us, words):  # type: ignore[no-untyped-def]
    """The first step's u of row r into plus (r = 0) or minus (r = 1): a copy of source, moved as _add_signs does."""
    k0, k1 = keys[0, 0], keys[0, 1]
    head = min(-start & 63, plus.size)
    full = (plus.size - head) >> 6
    tail = head + 64 * full
    _words(k0, k1, (start + head) >> 6, words[:full])
    for row in range(us.shape[0]):  # less than 64 elements at either end
        x = minus if row else plus
        _copy(source[:head], x[:head])
        _copy(source[tail:], x[tail:])
        _add_few_signs(x[:head], start, k0, k1, us[row, 0])
        _add_few_signs(x[tail:], start + tail, k0, k1, us[row, 0])
    if us.shape[0] == 1:
        _put_words(source[head:tail], plus[head:tail], start + head, us[0, 0], words)
    else:
        _put_both_words(source[head:tail], plus[head:tail], minus[head:tail], start + head, us[0, 0], us[1, 0], words)


@_jit
def _sum_signs(g, start, k0, k1, total, words):  # type: ignore[no-untyped-def]
    """total[(start+i) mod total.size] += s[start+i] * g[i] in float64, same limits as _add_signs."""
    full = g.size >> 6
    _words(k0, k1, start >> 6, words[: (g.size + 63) >> 6])
    bits = g.view(np.uint32)
    for w in range(full):
        offset = (start + 64 * w) & (total.size - 1) & _INDEX
        for h in range(2):
            half = np.uint32((words[w] >> np.uint64(32 * h)) & np.uint64(0xFFFFFFFF))
            i, j = 64 * w + 32 * h, offset + 32 * h
            for b in range(32):
                sign = np.uint32(np.uint32(half << np.uint32(31 - b)) & _TOP)
                total[j + b] += np.float64(np.uint32(bits[i + b] ^ sign).view(np.float32))
    for i in range(64 * full, g.size):
        value = np.float64(g[i])
        total[(start + i) & (total.size - 1)] += -value if (words[full] >> np.uint64(i & 63)) & _U1 else value


@_jit
def _sum_products(a, b, total):  # type: ignore[no-untyped-def]
    """total[i mod 64] += a[i] * b[i]; the float64 product of two float32 numbers is exact."""
    full = a.size >> 6
    for w in range(full):
        for lane in range(64):
            total[lane] += np.float64(a[64 * w + lane]) * np.float64(b[64 * w + lane])
    for i in range(64 * full, a.size):
        total[i & 63] += np.float64(a[i]) * np.float64(b[i])


# ---- spans of chunks: what one thread does in one go ----------------------------------------------


@_jit
def _bounds(span, length, start, size):  # type: ignore[no-untyped-def]
    """Positions in a slice of `size` elements that begins at `start`: spans of the full tensor end at multiples."""
    lower = start - (start & 63)
    return max(lower + span * length - start, 0), min(lower + (span + 1) * length - start, size)


@_jit
def tiled_add(source, plus, minus, keys, us, start, first, last):  # type: ignore[no-untyped-def]
    """us (1 or 2, steps, M): the first go into `plus`, the second, where there are any, into `minus`.

    Without a `source` (it is empty) both hold the weights already.
    """
    words = np.empty(spec.CHUNK >> 6, np.uint64)
    for chunk in range(first, last):
        begin, end = _bounds(chunk, spec.CHUNK, start, plus.size)
        done = 0
        if source.size > 0 and keys.shape[0] > 0:
            _put_signs(source[begin:end], plus[begin:end], minus[begin:end], start + begin, keys, us, words)
            done = 1
        elif source.size > 0:
            _copy(source[begin:end], plus[begin:end])
        for step in range(done, keys.shape[0]):
            k0, k1 = keys[step, 0], keys[step, 1]
            again = step > 0 and k0 == keys[step - 1, 0] and k1 == keys[step - 1, 1]  # one root for the whole run
            for row in range(us.shape[0]):
                x = (minus if row else plus)[begin:end]
                _add_signs(x, start + begin, k0, k1, us[row, step], words, again or row > 0)


@_jit
def tiled_project(g, keys, period, size, first, last):  # type: ignore[no-untyped-def]
    words = np.empty(spec.CHUNK >> 6, np.uint64)
    rows = np.zeros((last - first, period), np.float64)
    for chunk in range(first, last):
        stop = min((chunk + 1) * size, g.size)
        for start in range(chunk * size, stop, spec.CHUNK):
            _sum_signs(
                g[start : min(start + spec.CHUNK, stop)], start, keys[0, 0], keys[0, 1], rows[chunk - first], words
            )
    return rows


@_jit
def _seeds_sums(law, keys, coefs, start, totals, z, u, words):  # type: ignore[no-untyped-def]
    """totals[r, : z.size] <- sum over k of coefs[r, k] * z_k from `start` on; each z_k is made once for all rows.

    A coefficient of 0 is passed over: its product would not change a bit, since a sum that began with +0 is never -0.
    """
    totals[:] = 0.0
    for k in range(keys.shape[0]):
        made = False
        for row in range(totals.shape[0]):
            coef, total = coefs[row, k], totals[row, : z.size]
            if coef == 0.0:
                continue
            if law == spec.SIGN:
                u[:] = coef
                _add_signs(total, start, keys[k, 0], keys[k, 1], u, words, made)
            else:
                if not made:
                    _fill_unit(law, keys[k, 0], keys[k, 1], start, z)
                for i in range(total.size):
                    total[i] = total[i] + coef * z[i]
            made = True


@_jit
def seeds_add(source, plus, minus, both, law, keys, coefs, groups, start, first, last):  # type: ignore[no-untyped-def]
    """groups (n, 3): keys from, to, and the rows of coefs (rows, keys) that are added one after the other.

    With `both`, row 0 goes into `plus` and row 1 into `minus`; without, all rows go into `plus`. `source` as above.
    """
    words = np.empty(BLOCK >> 6, np.uint64)
    z = np.empty(BLOCK, np.float32)
    u = np.empty(spec.LANES, np.float32)
    totals = np.empty((coefs.shape[0], BLOCK), np.float32)
    for block in range(first, last):
        begin, end = _bounds(block, BLOCK, start, plus.size)
        if source.size > 0:
            for row in range(2 if both else 1):
                _copy(source[begin:end], (minus if row else plus)[begin:end])
        for group in range(groups.shape[0]):
            some, rows = slice(groups[group, 0], groups[group, 1]), groups[group, 2]
            _seeds_sums(law, keys[some], coefs[:rows, some], start + begin, totals[:rows], z[: end - begin], u, words)
            for row in range(rows):
                x, total = (minus if both and row else plus)[begin:end], totals[row]
                for i in range(x.size):
                    x[i] = x[i] + total[i]


@_jit
def seeds_project(g, law, keys, first, last):  # type: ignore[no-untyped-def]
    words = np.empty(spec.CHUNK >> 6, np.uint64)
    z = np.empty(BLOCK, np.float32)
    rows = np.zeros((last - first, keys.shape[0]), np.float64)
    for chunk in range(first, last):
        begin, end = chunk * spec.CHUNK, min(chunk * spec.CHUNK + spec.CHUNK, g.size)
        for k in range(keys.shape[0]):
            lanes = np.zeros(spec.LANES, np.float64)
            if law == spec.SIGN:
                _sum_signs(g[begin:end], begin, keys[k, 0], keys[k, 1], lanes, words)
            else:
                for start in range(begin, end, BLOCK):
                    size = min(BLOCK, end - start)
                    _fill_unit(law, keys[k, 0], keys[k, 1], start, z[:size])
                    _sum_products(z[:size], g[start : start + size], lanes)
            for lane in range(spec.LANES):
                rows[chunk - first, k] += lanes[lane]
    return rows


@_jit
def squares(x, first, last):  # type: ignore[no-untyped-def]
    rows = np.zeros((last - first, 1), np.float64)
    for chunk in range(first, last):
        lanes = np.zeros(spec.LANES, np.float64)
        part = x[chunk * spec.CHUNK : min(chunk * spec.CHUNK + spec.CHUNK, x.size)]
        _sum_products(part, part, lanes)
        for lane in range(spec.LANES):
            rows[chunk - first, 0] += lanes[lane]
    return rows


@_jit
def fwht(a):  # type: ignore[no-untyped-def]
    half = 1
    while half < a.size:
        for i in range(0, a.size, 2 * half):
            for j in range(i, i + half):
                x, y = a[j], a[j + half]
                a[j], a[j + half] = x + y, x - y
        half *= 2
