"""What each partition promises beyond the laws of its kind."""

import numpy as np
import pytest

from kilotune.core.errors import DataError
from kilotune.core.rng import stream
from kilotune.partition.dirichlet import Dirichlet
from kilotune.partition.field import ByField
from kilotune.partition.iid import IID
from kilotune.partition.shards import Shards


def labelled(count, labels, field="task"):
    return [{field: f"label{i % labels}"} for i in range(count)]


def label_counts(parts, rows, field="task"):
    names = sorted({row[field] for row in rows})
    return np.array([[sum(rows[i][field] == n for i in part) for n in names] for part in parts.values()])  # (K, L)


def test_by_field_gives_every_value_its_own_client():
    """Kills: a hash of the value; clients out of order."""
    rows = [{"client": c} for c in "bacab"]
    parts = ByField().split(rows, stream(0, "p"))
    assert {k: v.tolist() for k, v in parts.items()} == {"a": [1, 3], "b": [0, 4], "c": [2]}


def test_iid_sizes_differ_by_at_most_one_and_names_sort_as_numbers():
    """Kills: the remainder given to one client; client10 before client2."""
    parts = IID(num_clients=11).split([{}] * 100, stream(0, "p"))
    sizes = [len(part) for part in parts.values()]
    assert max(sizes) - min(sizes) == 1
    assert list(parts)[:3] == ["client00", "client01", "client02"] and list(parts)[-1] == "client10"


def test_iid_labels_are_spread_as_by_chance():
    """Kills: rows dealt out in file order. Counts are hypergeometric: 4 sigma = 4 sqrt(25 * 3/4) < 20."""
    rows = labelled(400, 4)
    rows.sort(key=lambda row: row["task"])
    counts = label_counts(IID(num_clients=4).split(rows, stream(1, "p")), rows)
    assert np.abs(counts - 25).max() < 20


def test_large_alpha_is_even_and_small_alpha_is_nearly_one_label_per_draw():
    """Kills: alpha not used, or used upside down."""
    rows = labelled(4000, 4)
    even = label_counts(Dirichlet(alpha=1e6, num_clients=4).split(rows, stream(0, "p")), rows)
    assert np.abs(even - 250).max() < 4 * np.sqrt(1000 * 3 / 16)
    skew = label_counts(Dirichlet(alpha=0.05, num_clients=4, min_rows=1).split(rows, stream(0, "p")), rows)
    assert (skew.max(axis=0) / 1000).mean() > 0.8  # most of a label is with one client


def test_mean_share_of_a_label_is_one_over_the_clients_even_when_labels_are_rare():
    """Kills: rounding down, which gives all rows of rare labels to the last client.

    1,500 labels of one row among 3 clients: binomial, 4 sigma = 4 sqrt(1500 * 2/9) < 74.
    """
    rows = [{"task": f"t{i}"} for i in range(1500)]
    parts = Dirichlet(alpha=1.0, num_clients=3).split(rows, stream(0, "p"))
    assert all(abs(len(part) - 500) < 74 for part in parts.values())


def test_dirichlet_keeps_the_minimum_or_says_why_it_cannot():
    """Kills: an endless loop; a client below min_rows."""
    rows = labelled(200, 4)
    parts = Dirichlet(alpha=0.2, num_clients=5, min_rows=20).split(rows, stream(0, "p"))
    assert min(len(part) for part in parts.values()) >= 20
    with pytest.raises(DataError, match="none of 1000 draws gave each of 10 clients at least 20 rows of 2 labels"):
        Dirichlet(alpha=0.001, min_rows=20).split(labelled(200, 2), stream(0, "p"))
    with pytest.raises(DataError, match=r"partition.min_rows: got 50 for 10 clients, expected at most 20"):
        Dirichlet(min_rows=50).split(rows, stream(0, "p"))


def test_a_client_sees_at_most_as_many_labels_as_its_shards_can_hold():
    """Kills: shards cut before sorting; one client's shards drawn with replacement."""
    rows = labelled(200, 10)  # 10 labels of 20 rows, 20 shards of 10: every shard has one label
    parts = Shards(num_clients=10, shards_per_client=2).split(rows, stream(0, "p"))
    counts = label_counts(parts, rows)
    assert ((counts > 0).sum(axis=1) <= 2).all() and (counts.sum(axis=1) == 20).all()


def test_shards_read_the_field_they_are_given():
    """Kills: a fixed field."""
    rows = labelled(8, 2, "output")
    parts = Shards(num_clients=2, shards_per_client=1, field="output").split(rows, stream(0, "p"))
    assert sorted(v.tolist() for v in parts.values()) == [[0, 2, 4, 6], [1, 3, 5, 7]]
