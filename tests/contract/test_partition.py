"""Laws of every partition the registry finds."""

import numpy as np
import pytest

from kilotune.core.registry import find, names
from kilotune.core.rng import stream


def build(name):
    method = find("partition", name)
    return method(**method.example)


def rows_for(method, count=60):
    return [dict.fromkeys(method.fields, f"v{(7 * i) % 4}") for i in range(count)]


@pytest.mark.parametrize("name", names("partition"))
@pytest.mark.parametrize("count", [12, 60, 61])
def test_a_partition_covers_every_row_once_and_leaves_no_client_empty(name, count):
    """Kills: rows lost in rounding; rows of two clients; empty clients; indices out of order."""
    method = build(name)
    parts = method.split(rows_for(method, count), stream(3, "partition"))
    assert list(parts) == sorted(parts)
    assert all(part.dtype == np.int64 and part.size and (np.diff(part) > 0).all() for part in parts.values())
    assert np.sort(np.concatenate(list(parts.values()))).tolist() == list(range(count))


@pytest.mark.parametrize("name", names("partition"))
def test_the_same_generator_gives_the_same_partition(name):
    """Kills: global randomness; state between calls."""
    method = build(name)
    first, second = (method.split(rows_for(method), stream(5, "partition")) for _ in range(2))
    assert {k: v.tolist() for k, v in first.items()} == {k: v.tolist() for k, v in second.items()}


@pytest.mark.parametrize("name", names("partition"))
def test_too_few_rows_are_refused_with_the_numbers(name):
    """Kills: a crash or an empty client on tiny data."""
    from kilotune.core.errors import DataError

    method = build(name)
    with pytest.raises(DataError, match=r"partition.*got .*expected at (most|least)"):
        method.split([], stream(0, "partition"))
