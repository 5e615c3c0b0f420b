"""Noise spec v1: known bits, laws, independence, and no dependence on how it is cut, ordered or threaded."""

import hashlib
import math
import os
import statistics
import subprocess
import sys

import numpy as np
import pytest

from kilotune.core import kernels, noise, reference

ROOT, INDEX, NAME = 0x0123456789ABCDEF, 5, "model.layers.0.mlp.up_proj.weight"

# law: key, words 0..2, bits of elements 0..7, SHA-256 of elements 0..99999 as little-endian float32
VECTORS = {
    "sign": (
        (0xE5E7F7AAFE8CA06A, 0x6E0AB91F21F72BBB),
        (0x6DF830653B3AAF04, 0x5CDEAD2C682D4936, 0x1B55DFA78F319BD5),
        (0x3F800000, 0x3F800000, 0xBF800000, 0x3F800000, 0x3F800000, 0x3F800000, 0x3F800000, 0x3F800000),
        "77fbdf37d132bbffd58db6f85d794c0f9eeecb46c0507a951f6ae9141934f75c",
    ),
    "gaussian": (
        (0x667D269555985CA6, 0xCD22A4F0C7A1130A),
        (0x9D7E731515BF5BE5, 0x392F6A54C74433BF, 0x42C327F2E7A8D58E),
        (0x3E95FA6C, 0xBF42C5A8, 0xBF2412BA, 0xBE10DCBC, 0xBFE5EB9E, 0xBFBCB308, 0x3E8346C9, 0xBE17CA1B),
        "9fca8eb5ba3d9bef3bf443d85d241c9adf6206ca59223460fd330d6d6cca77e8",
    ),
    "uniform": (
        (0x1645F9CB1EFACE46, 0x2E49316A5CEFE1DA),
        (0x386858C8F2568B07, 0x6EAB10FC95F3C028, 0xE81DAE0774F89DD1),
        (0xBF0F2F4F, 0xBE0AA77C, 0x3F503B5D, 0xBF50F085, 0x3DAC0A48, 0xBE941B1E, 0x3F16C1CB, 0xBF5E4BDB),
        "5769981f8cf621b16fa06f4637677d9ec00380f9bb49a1719e1a657cdb4d2e20",
    ),
}
MASK = (1 << 64) - 1


def python_word(key, j):
    """The mixer in Python's integers, straight from docs/wire.md."""
    x = (key[0] + (j + 1) * 0x9E3779B97F4A7C15) & MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    x = x ^ (x >> 31) ^ key[1]
    x = (x ^ (x >> 33)) * 0xFF51AFD7ED558CCD & MASK
    x = (x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53 & MASK
    return x ^ (x >> 33)


def unshift(x, shift):
    """The y with y ^ (y >> shift) = x."""
    y = x
    for _ in range(64 // shift):
        y = x ^ (y >> shift)
    return y


def key_with_word(word, j, k1):
    """The key (k0, k1) whose word j is `word`: the mixer run backwards."""
    x = unshift(word, 33)
    x = unshift(x * pow(0xC4CEB9FE1A85EC53, -1, 1 << 64) & MASK, 33)
    x = unshift(x * pow(0xFF51AFD7ED558CCD, -1, 1 << 64) & MASK, 33) ^ k1
    x = unshift(x, 31)
    x = unshift(x * pow(0x94D049BB133111EB, -1, 1 << 64) & MASK, 27)
    x = unshift(x * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & MASK, 30)
    return (x - (j + 1) * 0x9E3779B97F4A7C15) & MASK, k1


@pytest.mark.parametrize("law", noise.LAWS)
def test_known_vectors(law):
    """Kills: any change of the key, the mixer or a law; big-endian output; bit order within a word."""
    key, words, bits, digest = VECTORS[law]
    assert noise.stream_key(law, ROOT, INDEX, NAME) == key
    assert tuple(python_word(key, j) for j in range(3)) == words
    assert tuple(int(w) for w in reference.words(key, 0, 3)) == words
    z = noise.noise(law, ROOT, INDEX, NAME, 0, 100_000)
    assert z.dtype == np.float32
    assert tuple(int(b) for b in z[:8].view(np.uint32)) == bits
    assert hashlib.sha256(z.astype("<f4").tobytes()).hexdigest() == digest


def test_the_key_is_the_documented_hash():
    """Kills: a missing length prefix, a signed or big-endian field, a key that forgets the law."""
    name = "gewicht.ü"
    for law, root, index in (("sign", 0, 0), ("gaussian", MASK, 1), ("uniform", 1, MASK)):
        raw = name.encode("utf-8")
        message = (16).to_bytes(4, "little") + b"kilotune-noise-1" + len(law).to_bytes(4, "little") + law.encode()
        message += root.to_bytes(8, "little") + index.to_bytes(8, "little") + len(raw).to_bytes(4, "little") + raw
        digest = hashlib.sha256(message).digest()
        expected = (int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little"))
        assert noise.stream_key(law, root, index, name) == expected


def test_sign_and_uniform_elements_follow_from_the_words():
    """Kills: bit i & 63 taken from the top; 1 for +1; a uniform law that can reach 0 or 1, or that rounds."""
    key = noise.stream_key("sign", 3, 0, "w")
    expected = [1 - 2 * (python_word(key, i >> 6) >> (i & 63) & 1) for i in range(200)]
    assert noise.noise("sign", 3, 0, "w", 0, 200).tolist() == expected
    key = noise.stream_key("uniform", 3, 0, "w")
    exact = [(2 * (python_word(key, i) >> 40) + 1 - 2**24) / 2**24 for i in range(200)]
    assert noise.noise("uniform", 3, 0, "w", 0, 200).tolist() == exact


@pytest.mark.parametrize("law", noise.LAWS)
def test_any_slice_equals_the_slice_of_the_whole(law):
    """Kills: noise that depends on where a block starts or ends, as torch's does at sizes off a multiple of 16."""
    whole = reference.fill(law, noise.stream_key(law, 9, 2, "w"), 0, 9000)
    for start, count in ((0, 0), (0, 1), (1, 63), (63, 2), (64, 64), (65, 1000), (2047, 2), (2048, 4096), (8999, 1)):
        assert np.array_equal(noise.noise(law, 9, 2, "w", start, count), whole[start : start + count]), (start, count)
    far = 1 << 40
    assert np.array_equal(
        noise.noise(law, 9, 2, "w", far, 100), reference.fill(law, noise.stream_key(law, 9, 2, "w"), far, 100)
    )


def test_moments_of_the_laws_lie_within_five_sigma():
    """Kills: a wrong variance, a skewed law, a uniform law on [0, 1)."""
    n = 1 << 20
    for law, variance, fourth, sixth, eighth in (
        ("sign", 1, 1, 1, 1),
        ("gaussian", 1, 3, 15, 105),
        ("uniform", 1 / 3, 1 / 5, 1 / 7, 1 / 9),
    ):
        z = noise.noise(law, 11, 0, "moments", 0, n).astype(np.float64)
        for power, mean, square in ((1, 0, variance), (2, variance, fourth), (3, 0, sixth), (4, fourth, eighth)):
            bound = 5 * math.sqrt((square - mean**2) / n) + 1e-12
            assert abs((z**power).mean() - mean) <= bound, (law, power)


@pytest.mark.parametrize("law", noise.LAWS)
def test_streams_of_other_roots_indices_names_and_shifts_are_uncorrelated(law):
    """Kills: a field left out of the key; a counter that makes one stream a shifted copy of another."""
    n = 1 << 18
    base = noise.noise(law, 1, 0, "a", 0, n).astype(np.float64)
    others = {
        "root": noise.noise(law, 2, 0, "a", 0, n),
        "index": noise.noise(law, 1, 1, "a", 0, n),
        "name": noise.noise(law, 1, 0, "b", 0, n),
        "shift 1": noise.noise(law, 1, 0, "a", 1, n),
        "shift 64": noise.noise(law, 1, 0, "a", 64, n),
        "high root": noise.noise(law, 1 + (1 << 32), 0, "a", 0, n),
    }
    for what, other in others.items():
        correlation = (base * other).mean() / np.square(base).mean()
        assert abs(correlation) <= 5 / math.sqrt(n), what


def test_bits_of_the_words_are_balanced_and_avalanche():
    """Kills: a mixer whose low bits or neighbouring counters are weak. Bounds: five sigma over 64 x 64 bits."""
    n = 1 << 14
    words = reference.words((1, 2), 0, n)
    bits = (words[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(0) - 0.5).max() <= 5 * 0.5 / math.sqrt(n)
    for flipped in range(0, 64, 7):
        for key in ((1 ^ (1 << flipped), 2), (1, 2 ^ (1 << flipped))):
            other = reference.words(key, 0, n)
            change = ((words ^ other)[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
            assert np.abs(change.mean(0) - 0.5).max() <= 5 * 0.5 / math.sqrt(n), (flipped, key)


def test_gaussian_noise_follows_the_normal_law():
    """Kolmogorov-Smirnov, p = 1e-4: sup |F_n - F| <= 2.23 / sqrt(n). Kills: a wrong piece of the quantile function."""
    n = 20_000
    z = np.sort(noise.noise("gaussian", 4, 0, "ks", 0, n)).tolist()
    law = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in z])
    distance = max((np.arange(1, n + 1) / n - law).max(), (law - np.arange(n) / n).max())
    assert distance <= 2.23 / math.sqrt(n)


def test_the_quantile_function_equals_the_standard_librarys():
    """Relative error <= 2e-15 down to p = exp(-25), 1e-12 down to 2^-53. Kills: a mistyped coefficient or split."""
    p = np.concatenate([np.geomspace(2.0**-53, 0.5, 400), [0.075, 0.0750000001, math.exp(-25), 1.3e-11, 1.4e-11]])
    p = (np.floor(p * 2**52) + 0.5) * 2.0**-52
    exact = np.array([statistics.NormalDist().inv_cdf(x) for x in p.tolist()])
    bound = np.where(p > math.exp(-25), 2e-15, 1e-12) * np.abs(exact)
    for sign in (1.0, -1.0):
        assert (np.abs(reference.normal_quantile(sign * (p - 0.5)) - sign * exact) <= bound).all()


def test_our_logarithm_equals_libm():
    """Kills: a lost power of two; a mantissa range that leaves the series; too few terms."""
    p = np.concatenate([np.geomspace(2.0**-54, 0.075, 2000), 2.0 ** -np.arange(4.0, 54), [math.sqrt(0.5) / 64]])
    exact = np.array([math.log(x) for x in p.tolist()])
    assert (np.abs(reference.log(p) - exact) <= 4e-16 * np.abs(exact)).all()


def test_extreme_words_give_finite_symmetric_gaussians_equal_to_the_reference():
    """Words that random tests never meet, made by running the mixer backwards.

    Kills: p = 0 or 1 (infinite noise); a wrong value in the far tail; a lost sign in a tail.
    """
    for n in (0, 1, 2, 1000, 60_000, 63_000, 1 << 20, (1 << 51) - 1):
        exact = np.float32(statistics.NormalDist().inv_cdf((n + 0.5) * 2.0**-52))
        for half in (n, (1 << 52) - 1 - n):
            key = key_with_word((half << 12) | 0xABC, 7, k1=0x1234567887654321)
            assert python_word(key, 7) >> 12 == half
            compiled = kernels.fill("gaussian", key, 0, 20)
            assert np.array_equal(compiled, reference.fill("gaussian", key, 0, 20))
            assert compiled[7] == (exact if half == n else -exact)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("normal", 0, 0), "noise.law: got 'normal', expected one of sign, gaussian, uniform."),
        (("sign", -1, 0), "noise.root: got -1, expected 0 <= root < 2^64."),
        (("sign", 0, 1 << 64), "noise.index: got 18446744073709551616, expected 0 <= index < 2^64."),
    ],
)
def test_a_wrong_law_or_a_field_out_of_range_is_refused(arguments, message):
    """Kills: roots that are silently cut to 32 or 64 bits."""
    with pytest.raises(ValueError) as caught:
        noise.stream_key(*arguments, "w")
    assert str(caught.value) == message


SIZES = {"embed": 70_001, "norm": 576, "up": 2 * 65536 + 64, "bias": 1}

SCRIPT = """
import hashlib, sys
import numpy as np
from kilotune.core import kernels, noise
threads, backwards, frozen = int(sys.argv[1]), sys.argv[2] == "1", sys.argv[3].split(",")
kernels.set_threads(threads)
kernels._SPAN = 1 << 16
sizes = {"embed": 70001, "norm": 576, "up": 2 * 65536 + 64, "bias": 1}
lines = {}
for name in sorted(sizes, reverse=backwards):
    if name in frozen:
        continue
    w = np.linspace(-1, 1, sizes[name], dtype=np.float32)
    u = np.linspace(0.5, -0.25, 4096, dtype=np.float32)
    kernels.tiled_add(w, w, [(noise.stream_key("sign", root, 0, name), u) for root in (1, 2)])
    kernels.seeds_add(w, w, "gaussian", [([noise.stream_key("gaussian", 3, k, name) for k in (0, 9)], u[:2])])
    v = kernels.tiled_project(w, noise.stream_key("sign", 4, 0, name), 4096)
    bits = w.tobytes() + v.tobytes() + np.float32(kernels.rms(w)).tobytes()
    lines[name] = noise.tensor_digest("gaussian", [1, 2], name, sizes[name]) + hashlib.sha256(bits).hexdigest()
print(noise.digest("sign", [1, 2], {n: sizes[n] for n in (reversed(sizes) if backwards else sizes)}))
for name in sorted(lines):
    print(name, lines[name])
"""


def test_threads_processes_order_and_frozen_tensors_do_not_change_noise_or_replayed_weights():
    """One digest however it is computed.

    Kills: a shared generator, a reduction split by thread, noise that depends on visiting order.
    """
    runs = (("1", "0", ""), ("2", "1", "norm"))
    started = []
    for arguments in runs:
        env = {**os.environ, "OMP_NUM_THREADS": arguments[0], "NUMBA_NUM_THREADS": arguments[0]}
        env["PYTHONPATH"] = os.pathsep.join(sys.path)
        command = [sys.executable, "-c", SCRIPT, *arguments]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=500)[0].splitlines() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    one, two = outputs
    assert len(one) == 5
    assert two == [line for line in one if not line.startswith("norm ")]
    assert one[0] == noise.digest("sign", [1, 2], SIZES)
