"""Bandit: which arms devices are sent to, on fleets whose best arms are known."""

import json
import math

from kilotune.core.rng import stream
from kilotune.engine.partial.bandit import Arm, Bandit

LEVELS, RANKS, DEVICES = 5, 4, 10
BEST = (Arm(0, 1), Arm(1, 2), Arm(2, 0), Arm(4, 3))
C = 1.5  # of C · sqrt(K T ln T), K = 20 arms, T pulls; arms drawn at random come to more than 2 of it here


def reward(best: Arm, arm: Arm) -> float:
    """Mean reward where this arm is the best: 0.9, less with every step away."""
    return max(0.0, 0.9 - 0.2 * abs(arm.level - best.level) - 0.15 * abs(arm.rank - best.rank))


def play(bandit: Bandit, best: Arm, floors: dict[str, int], rounds: int) -> list[list[Arm]]:
    """Rounds of a class of devices; `floors` rise with what they are asked for."""
    rng, asked = stream(0, "fleet", best.level), []
    for _ in range(rounds):
        chosen = bandit.choose(floors)
        for device, arm in chosen.items():
            assert arm.level >= floors[device]
            floors[device] = arm.level
        noise = rng.uniform(-0.1, 0.1, len(chosen))
        bandit.learn([(arm, reward(best, arm) + e) for arm, e in zip(chosen.values(), noise, strict=True)])
        asked.append(list(chosen.values()))
    return asked


def test_after_300_rounds_four_fifths_of_the_pulls_are_best_arms_and_regret_stays_below_its_bound():
    """Kills: rewards credited to another arm; a bonus of the wrong sign; a fleet that all goes past its best level;
    one that never goes to it; pruning that is taken back."""
    late = []
    for best in BEST:
        asked = play(Bandit(LEVELS, RANKS, 0.25), best, {f"d{i}": 0 for i in range(DEVICES)}, 360)
        regret = pulls = 0.0
        for arms in asked:
            regret += sum(reward(best, best) - reward(best, arm) for arm in arms)
            pulls += len(arms)
            assert regret <= C * math.sqrt(LEVELS * RANKS * pulls * math.log(pulls))
        late.append([arm == best for arms in asked[300:] for arm in arms])
        assert sum(late[-1]) >= 0.8 * len(late[-1]), best


def test_a_device_alone_in_its_class_goes_one_level_past_the_best_at_most():
    """Kills: a device that tries everything and can never go back."""
    floors = {"alone": 0}
    play(Bandit(LEVELS, RANKS, 0.25), Arm(1, 1), floors, 120)
    assert floors["alone"] in (1, 2)


def test_a_bandit_that_was_written_down_asks_for_the_same_arms():
    """Kills: a count, a sum or the last gains that a resumed server has forgotten."""
    floors = {f"d{i}": 0 for i in range(4)}
    bandit = Bandit(LEVELS, RANKS, 0.25)
    play(bandit, BEST[1], floors, 30)
    again = Bandit(LEVELS, RANKS, 0.25).from_json(json.loads(json.dumps(bandit.to_json())))
    assert play(again, BEST[1], dict(floors), 30) == play(bandit, BEST[1], floors, 30)
