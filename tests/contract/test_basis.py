"""Laws of every basis the registry finds, and of every noise law of `seeds`; then what only `tiled` promises."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from kilotune.core import noise, registry
from kilotune.core.errors import WireError
from kilotune.core.int8 import Int8
from kilotune.core.types import SeedUpdate

SIZE = 64
CASES = [(name, {}) for name in registry.names("basis")] + [("seeds", {"law": "sign"}), ("seeds", {"law": "uniform"})]


@pytest.fixture(params=CASES, ids=lambda case: "-".join([case[0], *case[1].values()]))
def make(request):
    """Build the basis with some size."""
    name, fields = request.param
    kind = registry.find("basis", name)
    return lambda size=SIZE: kind(**{**kind.example, **fields, "size": size})


def numbers(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def pairs(indices, coefs, groups=None):
    return SeedUpdate(np.array(indices, np.int64), np.array(coefs, np.float32), groups)


def same(a, b):
    return torch.equal(a.reshape(-1).view(torch.int32), b.reshape(-1).view(torch.int32))


def direction(basis, index, name, root, *shape):
    """z_k as a tensor: what one unit coefficient adds to zero weights."""
    return basis.add(torch.zeros(shape), name, [(root, basis.direction(index))])


def test_one_unit_pair_is_its_direction(make):
    """Kills: coordinates and direction in two different vocabularies."""
    basis = make()
    for index in (0, 1, 37, SIZE - 1):
        coordinates = basis.coordinates(pairs([index], [1.0]))
        assert coordinates.shape == (SIZE,) and coordinates.dtype == torch.float32
        assert torch.equal(coordinates, basis.direction(index))


def test_order_of_pairs_leaves_no_trace(make):
    """Coefficients that cancel down to the errors of float64. Kills: sums in the order of arrival or of index only."""
    basis, rng = make(), np.random.default_rng(0)
    indices = np.repeat(rng.integers(0, SIZE, 1000), 2)
    coefs = (1e15 * rng.standard_normal(2000)).astype(np.float32)
    coefs[1::2] = -coefs[::2]
    indices, coefs = np.append(indices, np.arange(SIZE)), np.append(coefs, np.ones(SIZE, np.float32))
    first = basis.coordinates(pairs(indices, coefs))
    for _ in range(5):
        order = rng.permutation(indices.size)
        assert same(basis.coordinates(pairs(indices[order], coefs[order])), first)


def test_repeated_pairs_sum_up_and_no_pairs_are_zero(make):
    """Kills: the last of several equal directions winning; an empty update that fails."""
    basis = make()
    assert torch.equal(basis.coordinates(pairs([3, 3, 5], [1.0, 2.0, -4.0])), basis.coordinates(pairs([5, 3], [-4, 3])))
    assert torch.equal(basis.coordinates(pairs([], [])), torch.zeros(SIZE))


def test_adding_coordinates_adds_the_weighted_directions(make):
    """w + Σ a_k z_k in float64 within the float32 roundings. Kills: a scaled, dropped or swapped direction."""
    basis, weight = make(), numbers(1, 7, 33)
    indices, coefs = np.arange(SIZE), numbers(2, SIZE).numpy()
    z = torch.stack([direction(basis, k, "w", 5, 7, 33) for k in range(SIZE)]).double()
    got = basis.add(weight.clone(), "w", [(5, basis.coordinates(pairs(indices, coefs)))])
    expected = weight.double() + torch.einsum("k,kij->ij", torch.from_numpy(coefs).double(), z)
    magnitude = weight.abs().double() + torch.einsum("k,kij->ij", torch.from_numpy(np.abs(coefs)).double(), z.abs())
    assert ((got.double() - expected).abs() <= (SIZE + 3) * 2.0**-24 * magnitude).all()


def test_project_is_the_inner_product_with_what_each_coordinate_adds(make):
    """Adjoint of add. Kills: a projection on other noise than add uses; a missing scale."""
    basis, gradient = make(), numbers(3, 11, 91)
    got = basis.project(gradient, "w", 8)
    assert got.shape == (SIZE,) and got.dtype == torch.float32
    for j in range(SIZE):
        unit = torch.zeros(SIZE)
        unit[j] = 1.0
        z = basis.add(torch.zeros(11, 91), "w", [(8, unit)]).double()
        exact, magnitude = (z * gradient).sum(), (z * gradient).abs().sum()
        assert abs(got[j].double() - exact) <= 2.0**-22 * magnitude


def test_the_second_moment_of_every_direction_is_the_identity(make):
    """Mean of z zᵀ over 800 roots within six sigma. Kills: variance 1/3 or 1/d, entries that share noise."""
    basis, roots, n = make(16), 800, 6
    for index in (0, 11):
        z = torch.stack([direction(basis, index, "w", root, n) for root in range(roots)]).double()
        moment = z.T @ z / roots
        spread = z.pow(4).mean().sqrt().item()
        assert (moment - torch.eye(n)).abs().max() <= 6 * max(1.0, spread) / roots**0.5


def test_several_steps_equal_one_after_the_other(make):
    """Bit for bit. Kills: steps that are summed before they are added."""
    basis, weight = make(), numbers(4, 1000)
    steps = [(root, numbers(root, SIZE)) for root in (1, 2, 3)]
    together = basis.add(weight.clone(), "w", steps)
    apart = weight.clone()
    for step in steps:
        apart = basis.add(apart, "w", [step])
    assert same(together, apart)


def test_out_receives_the_result_and_spares_the_weight(make):
    """Kills: a weight that is written although out is given; a copy returned instead of out."""
    basis, weight, steps = make(), numbers(5, 40, 30), [(1, numbers(6, SIZE)), (2, numbers(7, SIZE))]
    before, out = weight.clone(), torch.full((40, 30), torch.nan)
    assert basis.add(weight, "w", steps, out=out) is out
    assert same(weight, before)
    assert basis.add(weight, "w", steps) is weight
    assert same(weight, out)
    for nothing in ([], [(1, torch.zeros(SIZE))]):
        assert same(basis.add(before, "w", nothing, out=torch.full((40, 30), torch.nan)), before)


def test_slices_of_a_tensor_equal_the_whole(make):
    """Bit for bit, at starts inside words and blocks. Kills: noise that begins anew in a slice; a lost head or tail."""
    basis, weight, size = make(), numbers(12, 300, 30), 9000
    steps = [(1, numbers(13, SIZE)), (2, numbers(14, SIZE))]
    whole = basis.add(weight, "w", steps, out=torch.empty(300, 30)).view(-1)
    for cuts in ([0, 1, 64, 65, 700, 5000, size], [0, 63, 2100, 4096, 8999, size]):
        for begin, end in pairwise(cuts):
            part = weight.view(-1)[begin:end]
            out = torch.full((end - begin,), torch.nan)
            assert same(basis.add(part, "w", steps, out=out, start=begin), whole[begin:end]), (begin, end)
            assert same(basis.add(part.clone(), "w", steps, start=begin), whole[begin:end]), (begin, end)
    with pytest.raises(ValueError, match="got start -1, expected"):
        basis.add(weight, "w", steps, start=-1)


def test_both_signs_at_once_equal_two_additions(make):
    """Bit for bit, zero coordinates and zero weights included. Kills: minus from rounded plus; swapped outputs."""
    basis, weight = make(), numbers(15, 7000)
    weight[::5] = 0.0
    weight[::7] = -0.0
    some = numbers(16, SIZE)
    some[3] = 0.0
    for start, coordinates, opposite in ((0, some, None), (77, some, numbers(17, SIZE)), (64, some, torch.zeros(SIZE))):
        before, both = weight.clone(), [torch.full((7000,), torch.nan) for _ in range(2)]
        basis.add_both(weight, "w", 5, coordinates, *both, start=start, opposite=opposite)
        assert same(weight, before)
        for got, coords in zip(both, (coordinates, -coordinates if opposite is None else opposite), strict=True):
            expected = basis.add(weight, "w", [(5, coords)], out=torch.empty(7000), start=start)
            assert same(got, expected), start
    with pytest.raises(TypeError, match=r"out of shape \(9,\), expected \(7000,\)"):
        basis.add_both(weight, "w", 5, some, torch.zeros(9), torch.zeros(9))


def test_stored_weights_are_widened_added_to_and_rounded_once(make):
    """Equal to float32 weights of the same values. Kills: half-precision sums; scales along the wrong side."""
    basis, exact, steps = make(), numbers(18, 40, 30), [(1, numbers(19, SIZE)), (2, numbers(20, SIZE))]
    int8 = Int8((exact * 50).clamp(-128, 127).to(torch.int8), numbers(21, 40).abs())
    weights = {"bf16": exact.bfloat16(), "fp16": exact.half(), "int8": int8}
    for kind, weight in weights.items():
        wide = weight.values.float() * weight.scales[:, None] if kind == "int8" else weight.float()
        expected = basis.add(wide, "w", steps, out=torch.empty(40, 30))
        assert same(basis.add(weight, "w", steps, out=torch.empty(40, 30)), expected)
        narrow = basis.add(weight, "w", steps, out=torch.empty(40, 30, dtype=torch.bfloat16))
        assert same(narrow.float(), expected.bfloat16().float())
        with pytest.raises(TypeError, match=r"expected contiguous float32|Give a float32 or bfloat16 tensor as out"):
            basis.add(weight, "w", steps)


def test_int8_weights_need_equally_long_rows():
    """Kills: a last row without a scale; scales of another type read as float32."""
    values = torch.zeros(4, 6, dtype=torch.int8)
    assert Int8(values, torch.ones(8)).shape == (4, 6)
    with pytest.raises(TypeError, match="got 5 scales for 24 values"):
        Int8(values, torch.ones(5))
    for wrong in ((values, torch.ones(4).double()), (values.float(), torch.ones(4)), (values, torch.ones(4, 1))):
        with pytest.raises(TypeError, match="expected int8 and float32"):
            Int8(*wrong)


def test_name_and_root_make_new_noise_and_the_shape_does_not(make):
    """Correlation of z under two names or roots below five sigma. Kills: one noise for all tensors."""
    basis, n = make(), 1 << 14
    flat = direction(basis, 3, "a", 1, n)
    assert same(direction(basis, 3, "a", 1, 128, 128), flat)
    for other in (direction(basis, 3, "b", 1, n), direction(basis, 3, "a", 2, n)):
        assert abs(torch.dot(flat, other)) / n <= 5 / n**0.5


def test_visiting_order_and_frozen_tensors_do_not_matter(make):
    """One digest however it is computed. Kills: any state carried from tensor to tensor."""
    basis, shapes = make(), {"a": (5, 13), "b": (100,), "c": (1,), "d": (65, 2)}
    coordinates = numbers(9, SIZE)

    def replay(names):
        return {name: basis.add(torch.ones(shapes[name]), name, [(3, coordinates)]) for name in names}

    forward, backward, half = replay("abcd"), replay("dcba"), replay("db")
    assert all(same(forward[name], backward[name]) for name in shapes)
    assert all(same(forward[name], half[name]) for name in half)


def test_parameters_that_ask_for_gradients_are_accepted(make):
    """Kills: a view taken without detaching."""
    basis, weight = make(), numbers(10, 70)
    moved = basis.add(torch.nn.Parameter(weight.clone()), "w", [(1, numbers(11, SIZE))])
    assert same(moved.data, basis.add(weight, "w", [(1, numbers(11, SIZE))]))


def test_foreign_indices_groups_and_tensors_are_refused(make):
    """Kills: an index that wraps around, a silent cast or copy, pairs of several groups in one vector."""
    basis = make()
    for index in (-1, SIZE):
        with pytest.raises(WireError, match=f"got direction {index}, expected 0 <= index < {SIZE}"):
            basis.coordinates(pairs([0, index], [1.0, 1.0]))
        with pytest.raises(WireError, match=f"got direction {index}"):
            basis.direction(index)
    with pytest.raises(ValueError, match="several groups"):
        basis.coordinates(pairs([0, 1], [1.0, 1.0], np.array([0, 1])))
    steps = [(1, torch.zeros(SIZE))]
    for wrong in (torch.zeros(8, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.float64), torch.zeros(8, 8).T[1:]):
        with pytest.raises(TypeError, match="expected contiguous float32 on cpu"):
            basis.add(wrong, "layer.w", steps)
        with pytest.raises(TypeError, match=r"layer\.w: got a"):
            basis.project(wrong, "layer.w", 1)
    with pytest.raises(TypeError, match=r"coordinates of shape \(63,\), expected \(64,\)"):
        basis.add(torch.zeros(8), "w", [(1, torch.zeros(63))])
    with pytest.raises(TypeError, match=r"out of shape \(9,\), expected \(8,\)"):
        basis.add(torch.zeros(8), "w", steps, out=torch.zeros(9))


def test_seeds_equals_brute_force_over_the_published_noise():
    """Exact with signs and integers. Kills: a key that leaves out the direction's index or the law."""
    basis = registry.find("basis", "seeds")(size=32, law="sign")
    a = torch.arange(32.0) - 9  # a zero among them
    got = basis.add(torch.full((1000,), 2.0), "layer.w", [(6, a)])
    z = np.array([noise.noise("sign", 6, k, "layer.w", 0, 1000) for k in range(32)])
    assert np.array_equal(got.numpy(), 2.0 + a.numpy() @ z)


def test_tiled_directions_are_a_hadamard_row_times_one_sign_per_element():
    """z_k[i] = s[i] (-1)^popcount(k & (i mod M)). Kills: rows in another order; noise that depends on k."""
    basis = registry.find("basis", "tiled")(size=16)
    s = noise.noise("sign", 4, 0, "layer.w", 0, 100)
    for k in range(16):
        expected = [s[i] * (-1) ** (k & (i % 16)).bit_count() for i in range(100)]
        assert direction(basis, k, "layer.w", 4, 100).tolist() == expected


@pytest.mark.parametrize("size", [1, 2, 64, 256])
def test_tiled_directions_are_exactly_orthogonal_over_whole_tiles(size):
    """z_k · z_l = d if k = l else 0, no rounding. Kills: a matrix that is only nearly orthogonal."""
    basis, numel = registry.find("basis", "tiled")(size=size), 3 * size
    z = torch.stack([direction(basis, k, "w", 7, numel) for k in range(size)])
    assert torch.equal(z @ z.T, numel * torch.eye(size))


@pytest.mark.parametrize(("size", "hint"), [(1000, "Use 512 or 1024."), (3, "Use 2 or 4.")])
def test_tiled_refuses_a_size_that_is_no_power_of_two(size, hint):
    """Kills: a size that is silently rounded."""
    with pytest.raises(ValidationError, match=f"got {size}, expected a power of two. {hint}"):
        registry.find("basis", "tiled")(size=size)


def test_defaults_are_those_of_the_sources():
    """Kills: a default changed by accident, which changes every recipe's bytes."""
    seeds, tiled = registry.find("basis", "seeds")(), registry.find("basis", "tiled")()
    assert (seeds.size, seeds.refresh, seeds.scale, seeds.law, seeds.one_pass) == (
        4096,
        "run",
        "none",
        "gaussian",
        False,
    )
    assert (tiled.size, tiled.refresh, tiled.scale, tiled.one_pass) == (4096, "round", "rms", True)
