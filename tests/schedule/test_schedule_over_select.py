"""Over-select: how many are asked and how many answers are enough."""

import pytest

from kilotune.core.rng import stream
from kilotune.schedule.over_select import OverSelect
from kilotune.schedule.uniform import Uniform

ROSTER = [f"client-{i:02d}" for i in range(20)]


@pytest.mark.parametrize(
    ("per_round", "factor", "asked"), [(10, 1.3, 13), (8, 1.3, 11), (10, 1.1, 11), (10, 1.0, 10), (1, 1.5, 2)]
)
def test_the_ceiling_of_factor_times_s_is_asked_and_s_answers_are_enough(per_round, factor, asked):
    """Kills: rounding down; 1.1 · 10 taken for 12; waiting for the spare ones."""
    schedule = OverSelect(clients_per_round=per_round, factor=factor)
    chosen = schedule.sample(1, ROSTER, stream(0))
    assert len(chosen) == asked
    assert schedule.enough(len(chosen)) == per_round
    assert chosen == Uniform(clients_per_round=asked).sample(1, ROSTER, stream(0))


def test_where_fewer_are_present_all_are_asked_and_no_more_is_waited_for():
    """Kills: a round that waits for answers of clients that are not there."""
    schedule = OverSelect(clients_per_round=10)
    assert schedule.sample(1, ROSTER[:4], stream(0)) == ROSTER[:4]
    assert schedule.enough(4) == 4


def test_schedules_without_spares_wait_for_everybody():
    """Kills: a round of `uniform` that ends before the last answer."""
    assert Uniform(clients_per_round=2).enough(5) == 5
