"""Compiled loops against plain NumPy, bit for bit, for awkward sizes, periods, laws and thread counts."""

import threading

import numpy as np
import pytest
import torch

from kilotune.core import _loops, kernels, noise, reference
from kilotune.core._spec import CHUNK

SIZES = (1, 2, 63, 64, 65, 1000, 2049, CHUNK + 17, 2 * CHUNK)
PERIODS = (1, 2, 32, 64, 128, 4096)


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    """One and two threads, with spans of one chunk so that both really work on small tensors."""
    monkeypatch.setattr(kernels, "_SPAN", CHUNK)
    monkeypatch.setattr(kernels, "_TILED_SPAN", 1)
    kernels.set_threads(request.param)
    yield request.param
    kernels.set_threads(None)


def numbers(*path, size):
    """Repeatable float32 numbers around 1 with a spread of exponents, so that every rounding shows."""
    rng = np.random.default_rng([*path, size])
    return (rng.standard_normal(size) * np.exp(rng.standard_normal(size))).astype(np.float32)


def cancelling(*path, signs):
    """Numbers whose sum after `signs` is small beside its terms: pairs ±1e15 in random places, the rest near 1.

    The error of a float64 sum then shows in float32, and with it the order in which the sum was taken.
    """
    rng, x = np.random.default_rng([*path, signs.size]), numbers(*path, size=signs.size)
    places = rng.permutation(signs.size)[: signs.size // 4 * 2]
    large = (1e15 * rng.standard_normal(places.size // 2)).astype(np.float32)
    x[places] = np.concatenate([large, -large])
    return x * signs


def same(a, b):
    """Equal bits, so that -0 and +0 differ."""
    return a.dtype == b.dtype == np.float32 and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("law", noise.LAWS)
def test_noise_equals_the_reference(law):
    """Kills: a vectorised loop that contracts a*b+c, a tail that is packed wrongly, a wrong word for a late start."""
    for root in (0, 1, (1 << 64) - 1):
        key = noise.stream_key(law, root, 3, "w")
        for start, count in ((0, 1), (0, 70_001), (5, 4095), (64, 2048), (2**33 + 1, 300)):
            assert same(kernels.fill(law, key, start, count), reference.fill(law, key, start, count)), (start, count)


@pytest.mark.parametrize("size", SIZES)
def test_tiled_add_equals_the_reference(size, threads):
    """Kills: a lost tail, a period that restarts at chunks, an addition order other than step by step."""
    weight = numbers(1, size=size)
    for period in PERIODS if size < CHUNK else PERIODS[::2]:
        steps = [((root, 7), numbers(root, size=period)) for root in (5, 2**63 + 9, 6, 6)]
        expected = reference.tiled_add(weight, steps)
        out = np.full_like(weight, np.nan)
        kernels.tiled_add(weight, out, steps)
        assert same(out, expected), period
        in_place = weight.copy()
        kernels.tiled_add(in_place, in_place, steps)
        assert same(in_place, expected), period


def test_many_steps_need_not_fit_into_one_pass(monkeypatch, threads):
    """Kills: a second pass that starts again from the weight, or drops the last group."""
    weight, out = numbers(2, size=1000), np.empty(1000, np.float32)
    steps = [((k, k), numbers(k, size=64)) for k in range(7)]
    monkeypatch.setattr(kernels, "_STEP_FLOATS", 3 * 64)
    kernels.tiled_add(weight, out, steps)
    assert same(out, reference.tiled_add(weight, steps))
    kernels.tiled_add(weight, out, [])
    assert same(out, weight)


def stored(kind, size, seed=0):
    """Weights of a kind, and what they are in float32."""
    x = numbers(20, seed, size=size)
    if kind == "int8":
        rows = next(r for r in (7, 5, 3, 1) if size % r == 0)
        values, scales = (x * 40).clip(-128, 127).astype(np.int8), np.abs(numbers(21, seed, size=rows))
        return kernels.Stored(values, scales), reference.widen(values, scales)
    values = {"float32": x, "bf16": reference.round_bf16(x), "fp16": x.astype(np.float16)}[kind]
    return values if kind == "float32" else kernels.Stored(values), reference.widen(values)


@pytest.mark.parametrize("law", noise.LAWS)
def test_steps_over_one_pool_equal_one_after_the_other(law, monkeypatch, threads):
    """Zeros in different places, more steps than are kept at a time. Kills: sums of steps merged before the weight;
    noise of the last direction taken for the next one where a coefficient is 0."""
    monkeypatch.setattr(kernels, "_ROWS", 3)
    weight, out, keys = numbers(50, size=5000), np.empty(5000, np.float32), [(k, 9) for k in range(4)]
    coefs = numbers(51, size=28).reshape(7, 4)
    coefs[[0, 1, 2, 4], [0, 1, 3, 0]] = 0.0
    expected = weight
    for row in coefs:
        expected = reference.seeds_add(expected, law, keys, row)
    expected = reference.seeds_add(expected, law, keys[:2], coefs[6, :2])
    kernels.seeds_add(weight, out, law, [(keys, coefs), (keys[:2], coefs[6, :2])])
    assert same(out, expected)


def test_every_half_precision_number_is_widened_exactly():
    """All 2 x 65,536 of them. Kills: subnormals taken for normal numbers, infinity for 65536, a lost sign of zero."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    out = np.empty(patterns.size, np.float32)
    for values, exact in (
        (patterns, torch.from_numpy(patterns.view(np.int16)).view(torch.bfloat16).float().numpy()),
        (patterns.view(np.float16), patterns.view(np.float16).astype(np.float32)),
    ):
        kernels.tiled_add(kernels.Stored(values), out, [])
        number = ~np.isnan(exact)
        assert same(out[number], exact[number])
        assert np.array_equal(np.isnan(out), ~number)
        assert np.array_equal(np.isnan(reference.widen(values)), ~number)
        assert same(reference.widen(values)[number], exact[number])


def test_bf16_results_are_rounded_to_nearest_even():
    """Against torch, with ties, infinities and numbers near them. Kills: truncation; NaN that becomes infinity."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    x = (
        np.concatenate([high | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
        .astype(np.uint32)
        .view(np.float32)
    )
    got = np.empty(x.size, np.uint16)
    kernels.tiled_add(x, got, [])
    number = ~np.isnan(x)
    exact = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(got[number], exact[number])
    assert np.isnan(reference.widen(got[~number])).all()
    assert np.array_equal(reference.round_bf16(x[number]), exact[number])


@pytest.mark.parametrize("kind", ["float32", "bf16", "fp16", "int8"])
def test_adding_to_stored_weights_equals_the_reference(kind, threads):
    """Sizes, starts, periods, roots and laws drawn at random. Kills: scales of the wrong row, a rounding per step,
    a chunk whose head or tail is lost, weights that are written."""
    rng = np.random.default_rng([30, len(kind)])
    for trial in range(12):
        size, start = int(rng.integers(1, 3000)), int(rng.integers(0, 200))
        if trial == 0:
            size, start = 2 * CHUNK + 35, CHUNK - 30
        weight, exact = stored(kind, size, trial)
        held = weight.values if isinstance(weight, kernels.Stored) else weight
        before, padding = held.tobytes(), np.zeros(start, np.float32)
        roots = [int(r) for r in rng.integers(0, 1 << 62, 3)]
        steps = [((root, 7), numbers(root, size=int(1 << rng.integers(0, 10)))) for root in roots]
        steps = [(key, np.resize(u, steps[0][1].size)) for key, u in steps]
        law, coefs = noise.LAWS[trial % 3], numbers(31, trial, size=2)
        moves = [([(root, 1), (root, 2)], coefs) for root in roots[:2]]
        tiled = reference.tiled_add(np.append(padding, exact), steps)[start:]
        seeds = np.append(padding, exact)
        for keys, a in moves:
            seeds = reference.seeds_add(seeds, law, keys, a)
        for dtype, convert in ((np.float32, np.copy), (np.uint16, reference.round_bf16)):
            out = np.empty(size, dtype)
            kernels.tiled_add(weight, out, steps, start)
            assert np.array_equal(out.view(np.uint8), convert(tiled).view(np.uint8)), (size, start)
            kernels.seeds_add(weight, out, law, moves, start)
            assert np.array_equal(out.view(np.uint8), convert(seeds[start:]).view(np.uint8)), (size, start, law)
        assert held.tobytes() == before
        assert kernels.rms(weight) == reference.rms(exact)


@pytest.mark.parametrize("kind", ["float32", "bf16", "int8"])
def test_two_results_at_once_equal_two_additions(kind, threads):
    """Kills: signs of the first result reused for another chunk; one result added to the other."""
    for size, start in ((5, 62), (CHUNK - 10, 77), (CHUNK + 100, 64), (2 * CHUNK + 35, CHUNK - 30)):
        weight, _ = stored(kind, size)
        us, coefs = numbers(40, size=256).reshape(2, 128), numbers(41, size=6).reshape(2, 3)
        keys = [(k, 5) for k in range(3)]
        for dtype in (np.float32, np.uint16):
            plus, minus, expected = (np.empty(size, dtype) for _ in range(3))
            kernels.tiled_both(weight, plus, minus, (3, 4), (us[0], us[1]), start)
            for got, u in zip((plus, minus), us, strict=True):
                kernels.tiled_add(weight, expected, [((3, 4), u)], start)
                assert np.array_equal(got.view(np.uint8), expected.view(np.uint8))
            for law in ("sign", "uniform"):
                kernels.seeds_both(weight, plus, minus, law, keys, coefs, start)
                for got, a in zip((plus, minus), coefs, strict=True):
                    kernels.seeds_add(weight, expected, law, [(keys, a)], start)
                    assert np.array_equal(got.view(np.uint8), expected.view(np.uint8)), law


def test_tiled_add_is_the_formula_in_exact_arithmetic():
    """w + s * u[i mod M] with integers, where float32 is exact. Kills: an error shared with the reference."""
    for size, period in ((1000, 16), (5000, 512)):
        weight, u = np.arange(size, dtype=np.float32), np.arange(1, period + 1, dtype=np.float32)
        out = np.empty_like(weight)
        kernels.tiled_add(weight, out, [(noise.stream_key("sign", 1, 0, "w"), u)])
        s = noise.noise("sign", 1, 0, "w", 0, size)
        assert out.tolist() == [weight[i] + s[i] * u[i % period] for i in range(size)]


def test_the_worked_example_of_the_specification():
    """docs/wire.md, last lines. Kills: a document and a program that drift apart."""
    key, out = noise.stream_key("sign", 1, 0, "w"), np.arange(8, dtype=np.float32)
    assert kernels.tiled_project(out, key, 4).tolist() == [4, 6, 8, 4]
    kernels.tiled_add(out, out, [(key, np.array([1, 2, 3, 4], np.float32))])
    assert out.tolist() == [1, 3, 5, -1, 5, 7, 9, 11]


@pytest.mark.parametrize("size", [*SIZES, (1 << 20) + 17])
def test_tiled_project_equals_the_reference(size, threads):
    """Kills: partial sums in the order of threads, float32 accumulation, lanes of a short period left unfolded."""
    g = numbers(3, size=size)
    for period in PERIODS if size < CHUNK else (1, 64, 4096):
        assert same(kernels.tiled_project(g, (8, 9), period), reference.tiled_project(g, (8, 9), period)), period


def test_sums_are_taken_in_the_documented_order(monkeypatch, threads):
    """Kills: rows folded in another order, sums by span, pairwise sums, for any span and thread count."""
    key = noise.stream_key("sign", 1, 0, "w")
    g = cancelling(10, signs=reference.fill("sign", key, 0, 9 * CHUNK + 77))
    expected = reference.seeds_project(g, "sign", [key, (1, 2)])
    tiles = {period: reference.tiled_project(g, key, period) for period in (1, 4)}
    for span in (CHUNK, 4 * CHUNK, 100 * CHUNK):
        monkeypatch.setattr(kernels, "_SPAN", span)
        assert same(kernels.seeds_project(g, "sign", [key, (1, 2)]), expected)
        assert same(kernels.seeds_project(g, "sign", [key]), expected[:1])
        for period, tile in tiles.items():
            assert same(kernels.tiled_project(g, key, period), tile)


def test_partial_sums_equal_the_reference_in_float64():
    """Before the rounding that hides them. Kills: lanes folded in another order, a lane lost at the tail."""
    g = numbers(11, size=2 * CHUNK + 77)
    parts = [slice(0, CHUNK), slice(CHUNK, 2 * CHUNK), slice(2 * CHUNK, None)]
    assert _loops.squares(g, 0, 3)[:, 0].tolist() == [reference.dot(g[part], g[part]) for part in parts]
    keys = np.array([(3, 4), (5, 6)], np.uint64)
    for code, law in enumerate(noise.LAWS):
        z = [reference.unit(law, (int(k0), int(k1)), g.size) for k0, k1 in keys]
        expected = [[reference.dot(zk[part], g[part]) for zk in z] for part in parts]
        assert _loops.seeds_project(g, code, keys, 0, 3).tolist() == expected, law
    signed = g.astype(np.float64) * reference.fill("sign", (3, 4), 0, g.size)
    expected = reference.lane_sum(signed, 128, 1 << 20)
    assert np.array_equal(_loops.tiled_project(g, keys, 128, 1 << 20, 0, 1)[0], expected)


def test_results_come_in_the_order_of_the_spans_even_when_the_first_is_last():
    """The first span waits until the last one is done. Kills: partial sums added as they are completed."""
    done = threading.Event()

    def work(first, last):
        if last == 10:
            done.set()
        return first, last, first > 0 or done.wait(60)

    kernels.set_threads(2)
    try:
        assert list(kernels._spans(work, 10, 3)) == [(0, 3, True), (3, 6, True), (6, 9, True), (9, 10, True)]
    finally:
        kernels.set_threads(None)


def test_tiled_project_is_the_inner_product_rounded_once():
    """|error| <= half an ulp of float32 plus what float64 sums lose. Kills: float32 partial sums."""
    size, period = 300_000, 8
    g, s = numbers(4, size=size), noise.noise("sign", 2, 0, "w", 0, size)
    got = kernels.tiled_project(g, noise.stream_key("sign", 2, 0, "w"), period).astype(np.float64)
    for j in range(period):
        terms = (g[j::period] * s[j::period]).astype(np.float64)
        exact = float(np.sum(terms.astype(np.longdouble)))
        bound = 2.0**-24 * abs(exact) + terms.size * 2.0**-53 * float(np.abs(terms).sum())
        assert abs(got[j] - exact) <= bound


@pytest.mark.parametrize("law", noise.LAWS)
def test_seeds_kernels_equal_the_reference(law, threads):
    """Kills: directions summed out of order, a fused multiply-add, the sqrt(3) of the uniform law left out."""
    for size in SIZES:
        weight, keys = numbers(5, size=size), [noise.stream_key(law, 1, k, "w") for k in (0, 4, 7)]
        coefs = np.array([0.3, -1e-3, 7.0], dtype=np.float32)
        expected = reference.seeds_add(weight, law, keys, coefs)
        out = np.full_like(weight, np.nan)
        kernels.seeds_add(weight, out, law, [(keys, coefs)])
        assert same(out, expected), size
        in_place = weight.copy()
        kernels.seeds_add(in_place, in_place, law, [(keys, coefs)])
        assert same(in_place, expected), size
        assert same(kernels.seeds_project(weight, law, keys), reference.seeds_project(weight, law, keys)), size


@pytest.mark.parametrize("law", noise.LAWS)
def test_seeds_kernels_are_the_formula_up_to_rounding(law):
    """Against float64 sums of noise(). Kills: an error shared with the reference; a direction taken twice."""
    size, count = 5000, 20
    unit = 3**0.5 if law == "uniform" else 1.0
    z = np.array([noise.noise(law, 3, k, "w", 0, size) for k in range(count)], dtype=np.float64) * unit
    keys, coefs = [noise.stream_key(law, 3, k, "w") for k in range(count)], numbers(6, size=count)
    weight, out = numbers(7, size=size), np.empty(size, np.float32)
    kernels.seeds_add(weight, out, law, [(keys, coefs)])
    bound = (count + 3) * 2.0**-24 * (np.abs(coefs) @ np.abs(z) + np.abs(weight))
    assert (np.abs(out - (weight + coefs @ z)) <= bound).all()
    bound = 2.0**-22 * (np.abs(z) @ np.abs(weight))
    assert (np.abs(kernels.seeds_project(weight, law, keys) - z @ weight) <= bound).all()


def test_sqrt3_makes_the_uniform_law_of_variance_one():
    """Kills: a scale of sqrt(3)^2 or of 1. E[z z] over 2^18 elements within five sigma of 1."""
    z = np.zeros(1 << 18, np.float32)
    kernels.seeds_add(z, z, "uniform", [([(1, 2)], np.ones(1, np.float32))])
    assert abs(np.square(z.astype(np.float64)).mean() - 1) <= 5 * (0.8 / z.size) ** 0.5


@pytest.mark.parametrize("size", [0, *SIZES, (1 << 20) + 17])
def test_rms_equals_the_reference(size, threads):
    """Kills: a sum split by thread, NumPy's pairwise order, float32 squares."""
    weight = numbers(8, size=size)
    assert kernels.rms(weight) == reference.rms(weight)
    assert kernels.rms(torch.from_numpy(weight)) == reference.rms(weight)


def test_rms_has_a_floor_and_keeps_nan():
    """Kills: a zero tensor that can never move; NaN weights taken for zero."""
    assert kernels.rms(np.zeros(100, np.float32)) == float(np.float32(1e-4))
    assert kernels.rms(np.full(100, 1e-6, np.float32)) == float(np.float32(1e-4))
    assert kernels.rms(np.full((4, 25), -0.5, np.float32)) == 0.5
    assert np.isnan(kernels.rms(np.array([np.nan, 1.0], np.float32)))


@pytest.mark.parametrize("size", [1, 2, 8, 64, 4096])
def test_fwht_equals_the_reference_and_leaves_its_input(size):
    """Kills: another order of butterflies (other roundings), sequency order, work in place."""
    a = numbers(9, size=size)
    before = a.copy()
    assert same(kernels.fwht(a), reference.fwht(a))
    assert same(a, before)


def test_fwht_is_the_hadamard_matrix_in_natural_order():
    """With integers, where float32 is exact. Kills: a wrong sign, a bit-reversed order; H H = M I as well."""
    size = 64
    hadamard = np.array([[(-1) ** (k & j).bit_count() for k in range(size)] for j in range(size)], dtype=np.float32)
    a = np.arange(size, dtype=np.float32) - 20
    assert np.array_equal(kernels.fwht(a), hadamard @ a)
    assert np.array_equal(kernels.fwht(kernels.fwht(a)), size * a)


def test_fwht_and_set_threads_refuse_what_they_cannot_do():
    """Kills: an fwht that silently cuts or pads; zero threads that hang."""
    for size in (0, 3, 100):
        with pytest.raises(ValueError, match=f"got {size} numbers, expected a power of two"):
            kernels.fwht(np.zeros(size, np.float32))
    with pytest.raises(ValueError, match="got 0, expected at least 1"):
        kernels.set_threads(0)


def test_threads_follow_torch_unless_set():
    """Kills: a setting that is ignored or that cannot be taken back."""
    kernels.set_threads(3)
    assert kernels.threads() == 3
    kernels.set_threads(None)
    assert kernels.threads() == torch.get_num_threads()
