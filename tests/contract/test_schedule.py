"""Laws of every schedule the registry finds."""

import numpy as np
import pytest

from kilotune.core.registry import find, names
from kilotune.core.rng import stream
from kilotune.schedule import Schedule

ROSTER = [f"client-{i:02d}" for i in range(10)]


def build(name: str) -> Schedule:
    method = find("schedule", name)
    return method(**method.example)


@pytest.mark.parametrize("name", names("schedule"))
def test_a_choice_is_a_sorted_sublist_of_the_roster_without_repeats(name: str) -> None:
    """Kills: drawing with replacement; clients that are not present; results in order of drawing; a
    schedule that says it asks everybody and does not."""
    for number in range(1, 30):
        chosen = build(name).sample(number, ROSTER, stream(0, "schedule", number))
        assert chosen == sorted(set(chosen))
        assert set(chosen) <= set(ROSTER)
        assert chosen
        assert chosen == ROSTER or not build(name).everybody


@pytest.mark.parametrize("name", names("schedule"))
def test_the_same_generator_gives_the_same_choice_whatever_the_order_of_arrival(name: str) -> None:
    """Kills: global random numbers; a choice that depends on who connected first."""
    for number in range(1, 10):
        first = build(name).sample(number, ROSTER, stream(0, "schedule", number))
        assert build(name).sample(number, ROSTER[::-1], stream(0, "schedule", number)) == first


@pytest.mark.parametrize("name", names("schedule"))
def test_nobody_present_gives_nobody(name: str) -> None:
    """Kills: an index error when all clients have left."""
    assert build(name).sample(1, [], stream(0)) == []


def test_all_takes_everybody_in_every_round() -> None:
    """Kills: a schedule that draws although it should not."""
    rng = stream(0)
    state = rng.bit_generator.state["state"]["counter"].tolist()
    assert find("schedule", "all")().sample(3, ROSTER, rng) == ROSTER
    assert rng.bit_generator.state["state"]["counter"].tolist() == state


@pytest.mark.parametrize(("asked", "taken"), [(1, 1), (4, 4), (10, 10), (11, 10)])
def test_uniform_takes_the_number_asked_for_or_all_present(asked: int, taken: int) -> None:
    """Kills: an error or an endless wait when fewer clients are present than asked for."""
    schedule = find("schedule", "uniform")(clients_per_round=asked)
    assert len(schedule.sample(1, ROSTER, stream(0))) == taken


def test_uniform_takes_every_pair_of_clients_equally_often() -> None:
    """Kills: neighbours drawn together; a first or last client never drawn. Bound: 4.5 sigma per pair."""
    schedule, rng, draws = find("schedule", "uniform")(clients_per_round=2), stream(0, "pairs"), 4500
    counts = np.zeros((10, 10))
    for number in range(draws):
        a, b = (ROSTER.index(client) for client in schedule.sample(number + 1, ROSTER, rng))
        counts[a, b] += 1
    pairs = counts[np.triu_indices(10, 1)]
    expected = draws / 45
    assert pairs.sum() == draws
    assert np.abs(pairs - expected).max() <= 4.5 * np.sqrt(expected * (1 - 1 / 45))
