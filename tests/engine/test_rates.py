"""The rate over a run."""

import math

import pytest

from kilotune.engine.training.step import rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", (1, 1, 1, 1, 1)),
        ("linear", (1, 0.75, 0.5, 0.25, 0)),
        ("cosine", (1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0)),
        ("wsd", (1, 1, 1, 0.5, 0)),
    ],
)
def test_schedules_fall_to_zero_along_their_curves_after_the_warm_up(schedule, expected):
    """Kills: a decay that counts the warm-up twice; one over another part of the run; a first step of rate 0."""
    whole = [rate(schedule, 0.0, progress) for progress in (0, 0.25, 0.5, 0.75, 1)]
    assert whole == pytest.approx(expected)
    late = [rate(schedule, 0.2, 0.2 + 0.8 * progress) for progress in (0, 0.25, 0.5, 0.75, 1)]
    assert late == pytest.approx(expected)
    assert rate(schedule, 0.2, 0.1) == 0.5
    assert 0 < rate(schedule, 0.2, 0.0) < 0.1
