"""Projection: the proof tests of Ferret's card, grouping, the clip, the size formula."""

import numpy as np
import pytest
import torch

from kilotune.codec import SeedUpdate, TensorUpdate, WireContext, WireError
from kilotune.codec._groups import budgets, groups_of
from kilotune.codec.projection import Projection
from kilotune.core.noise import noise
from kilotune.core.rng import stream

SHAPES = {"z.first": (40,), "m.small": (5,), "a.big": (30, 20), "b.mid": (100,), "q": (7, 10)}


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> TensorUpdate:
    rng = stream(seed, "delta")
    return TensorUpdate({n: torch.from_numpy(rng.normal(size=s).astype(np.float32)) for n, s in shapes.items()})


def context(shapes: dict[str, tuple[int, ...]], root: int = 3, size: int = 0) -> WireContext:
    return WireContext(1, root, shapes, size, stream(root, "private"))


def through(codec: Projection, update: TensorUpdate, wire: WireContext) -> tuple[SeedUpdate, dict[str, torch.Tensor]]:
    sent = codec.decode(codec.encode(update, wire, {}), wire)
    return sent, dict(codec.expand(sent, wire))


@pytest.mark.parametrize(("law", "count"), [("uniform", 200), ("sign", 200), ("gaussian", 60)])
def test_rebuilds_are_unbiased_with_scale_one(law: str, count: int) -> None:
    """Kills: a missing sqrt(3) or 1/n; the official code's factor 1/3.

    Oracle: the change itself, d = 2000, n = 50. The part of the rebuilds along the change must be 1 within 3 standard
    errors, and the distance of their mean from the change within 3 of those of independent errors.
    """
    shapes, codec = {"w": (2000,)}, Projection(law=law, num_seeds=50, max_norm=1e9)
    x = draw(shapes).tensors["w"].double()
    rebuilds = [through(codec, draw(shapes), context(shapes, root))[1]["w"].double() for root in range(count)]
    along = torch.stack([rebuilt @ x / (x @ x) for rebuilt in rebuilds])
    assert abs(along.mean() - 1) <= 3 * along.std() / count**0.5
    off = (torch.stack(rebuilds).mean(0) - x).norm() ** 2 / (x @ x)
    expected = 2000 / (50 * count)
    assert abs(off / expected - 1) <= 3 * (2 / 2000) ** 0.5 + 0.001  # 0.001: terms of order 1 / d


@pytest.mark.parametrize("num_seeds", [200, 2000])
@pytest.mark.parametrize("law", ["uniform", "sign"])
def test_direction_of_the_rebuild_follows_the_law(law: str, num_seeds: int) -> None:
    """Kills: repeated or correlated noise. cos = sqrt(n / (n + d)) within 5 %, mean of 10 rebuilds."""
    shapes, codec = {"w": (2000,)}, Projection(law=law, num_seeds=num_seeds, max_norm=1e9)
    x = draw(shapes).tensors["w"]
    got = [
        torch.cosine_similarity(through(codec, draw(shapes), context(shapes, root))[1]["w"], x, dim=0)
        for root in range(10)
    ]
    assert abs(float(torch.stack(got).mean()) / (num_seeds / (num_seeds + 2000)) ** 0.5 - 1) <= 0.05


def test_groups_are_filled_in_model_order_up_to_the_limit() -> None:
    """Kills: sorting names; adding to a group beyond 0.9 median; a big tensor that shares its group."""
    sizes = {"a": 100, "b": 10, "c": 30, "x": 4, "d": 51, "e": 40, "f": 100, "g": 1000, "h": 5, "i": 100}  # up to 40.95
    assert groups_of(sizes) == [["a"], ["b", "c"], ["x"], ["d"], ["e"], ["f"], ["g"], ["h"], ["i"]]
    assert groups_of({}) == []


def test_budgets_stay_within_k_per_group_and_the_largest_norm_gets_all() -> None:
    """Kills: rounding up; budgets by size instead of norm."""
    norms = np.array([1.0, 0.5, 0.001, 0.0, 0.999])
    assert budgets(norms, 200).tolist() == [200, 100, 2, 2, 199]
    assert budgets(norms, 1).tolist() == [1] * 5
    with np.errstate(all="raise"):
        assert budgets(np.zeros(3), 200).tolist() == [2, 2, 2]
    codec, wire = Projection(num_seeds=60), context(SHAPES)
    update = draw(SHAPES)
    sent, _ = through(codec, update, wire)
    groups = groups_of({name: tensor.numel() for name, tensor in update.tensors.items()})
    lengths = [torch.cat([update.tensors[n].reshape(-1) for n in members]).norm() for members in groups]
    counts = np.bincount(sent.groups, minlength=len(groups))
    assert counts[int(np.argmax(lengths))] == 60
    assert counts.sum() <= 60 * len(groups)
    for group in range(len(groups)):
        chosen = sent.indices[sent.groups == group]
        assert sorted(set(chosen.tolist())) == chosen.tolist()


def test_coordinates_are_inner_products_over_the_whole_group() -> None:
    """Kills: one share of a group's tensors forgotten or noise of the wrong tensor. Oracle: plain noise()."""
    codec, wire = Projection(num_seeds=30, max_norm=1e9), context(SHAPES)
    update = draw(SHAPES)
    sent, rebuilt = through(codec, update, wire)
    groups = groups_of({name: tensor.numel() for name, tensor in update.tensors.items()})
    assert any(len(members) > 1 for members in groups)
    for group, members in enumerate(groups):
        mine = sent.groups == group
        total = {name: np.zeros(update.tensors[name].numel()) for name in members}
        for k, coordinate in zip(sent.indices[mine], sent.coefs[mine], strict=True):
            inner = 0.0
            for name in members:
                v = noise("uniform", 3, int(k), name, 0, total[name].size) * 3**0.5
                inner += float(update.tensors[name].reshape(-1).numpy().astype(np.float64) @ v)
                total[name] += float(coordinate) * v
            assert coordinate == pytest.approx(inner / mine.sum(), rel=1e-5, abs=1e-5)
        for name in members:
            np.testing.assert_allclose(rebuilt[name].numpy().reshape(-1), total[name], rtol=1e-4, atol=1e-4)


def test_a_zero_change_rebuilds_to_nothing() -> None:
    """Kills: 0 / 0 in the budgets."""
    codec, wire = Projection(), context(SHAPES)
    zero = TensorUpdate({name: torch.zeros(shape) for name, shape in SHAPES.items()})
    sent, rebuilt = through(codec, zero, wire)
    assert not sent.coefs.any()
    assert all(not change.any() for change in rebuilt.values())


def test_each_share_is_scaled_down_to_the_largest_norm_and_bad_numbers_are_skipped() -> None:
    """Kills: a clip of the sum; a clip per tensor; NaN that reaches the weights. Signs: |v| = sqrt(d) exactly."""
    shapes, codec = {"a": (60,), "b": (40,), "c": (150,), "d": (200,), "e": (160,)}, Projection(law="sign", max_norm=10)
    wire = context(shapes)
    assert groups_of({name: shape[0] for name, shape in shapes.items()})[0] == ["a", "b"]
    shares = {}
    for k, value in {1: 50.0, 2: 0.5, 3: np.nan, 4: np.inf}.items():
        one = SeedUpdate(np.array([k]), np.array([value], np.float32), np.array([0]))
        shares[k] = dict(codec.expand(one, wire))
    assert float(torch.cat(list(shares[1].values())).norm()) == pytest.approx(10, rel=1e-6)
    assert float(torch.cat(list(shares[2].values())).norm()) == pytest.approx(0.5 * 10, rel=1e-6)
    assert shares[3] == shares[4] == {}


@pytest.mark.parametrize("size", [0, 77])
def test_bytes_follow_the_formula_and_the_budget_bounds_them(size: int) -> None:
    """Kills: a dense K x G matrix on the wire; K from the field although the basis has its own size."""
    codec, wire = Projection(num_seeds=77 if size == 0 else 200), context(SHAPES, size=size)
    payload = codec.encode(draw(SHAPES), wire, {})
    sent, numel = codec.decode(payload, wire), {name: int(np.prod(shape)) for name, shape in SHAPES.items()}
    num_groups = len(groups_of(numel))
    assert len(payload) == 19 + 2 * num_groups + 6 * sent.indices.size
    assert len(payload) == codec.predict_bytes(numel, sent.indices.size)
    assert len(payload) <= codec.predict_bytes(numel, 0) == 19 + 2 * num_groups + 6 * codec.num_seeds * num_groups


def test_the_servers_coordinates_travel_in_the_same_form() -> None:
    """Kills: aggregated pairs that lose their group; golden bytes of version 1."""
    shapes = {"b": (4,), "a": (4,)}
    wire = WireContext(1, 0, shapes)
    update = SeedUpdate(np.array([9, 2, 5]), np.array([1.0, 2.0, -0.5], np.float32), np.array([1, 1, 0]))
    payload = Projection().encode(update, wire, {})
    golden = "50524a31 02 936cbd37 c800 02000000 03000000 0100 0200 0500 0200 0900 000000bf 00000040 0000803f"
    assert payload == bytes.fromhex(golden)
    got = Projection().decode(payload, wire)
    assert (got.indices.tolist(), got.coefs.tolist(), got.groups.tolist()) == ([5, 2, 9], [-0.5, 2.0, 1.0], [0, 1, 1])


def test_the_order_of_the_model_is_part_of_the_table() -> None:
    """Kills: groups formed from another order than the sender's."""
    payload = Projection().encode(draw(SHAPES), context(SHAPES), {})
    with pytest.raises(WireError, match="table checksum"):
        Projection().decode(payload, context(dict(sorted(SHAPES.items()))))
