"""Bandit: which pruning ratio and which rank pay on devices of one class, learnt from what their rounds have brought.

An arm is a pruning ratio ρ, its *level*, and a rank r. Its index is UCB1's, mean reward + c · sqrt(ln t / n). What a
device has removed does not come back, so two rules keep it from going too far: a device may follow to a level whose
best arm has a *lower* bound, mean - c · sqrt(ln t / n), above the best mean of the level before; and one device of the
class at a time goes one level beyond and learns for all. Past the best level the reward is taken to fall.

Source: Auer, Cesa-Bianchi and Fischer, "Finite-time Analysis of the Multiarmed Bandit Problem", Machine Learning 47,
2002 (UCB1); neighbours of the leader only: Combes and Proutiere, "Unimodal Bandits: Regret Lower Bounds and Optimal
Algorithms", arXiv 1405.5096; the arms: Yao et al., "Efficient Deployment of Large Language Models on
Resource-constrained Devices" (FedSpine), arXiv 2501.02438.
Departs: a grid instead of a continuous space that is split as it is explored.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

WINDOW = 64  # gains that say what a large one is
HIGH = 0.9  # quantile of these that counts as a reward of 1


class Arm(NamedTuple):
    """Places in the lists of pruning ratios and of ranks."""

    level: int
    rank: int


class Bandit:
    """One class of devices. It learns from rewards alone and draws no random numbers."""

    def __init__(self, levels: int, ranks: int, exploration: float) -> None:
        self._arms = [Arm(level, rank) for level in range(levels) for rank in range(ranks)]
        self._exploration = exploration
        self._counts = dict.fromkeys(self._arms, 0)
        self._sums = dict.fromkeys(self._arms, 0.0)
        self._recent: deque[float] = deque(maxlen=WINDOW)

    # -- choosing ---------------------------------------------------------------------------------------------

    def choose(self, floors: Mapping[str, int]) -> dict[str, Arm]:
        """An arm for each device of a round, at its floor or above. What is asked of one counts for the next."""
        asked, standing, chosen = dict(self._counts), dict(floors), dict[str, Arm]()
        goal = self._goal()
        for device in sorted(floors, key=lambda name: (-floors[name], name)):
            reach = goal if any(level > goal for level in standing.values()) else goal + 1
            reach = max(standing[device], reach)
            open_ = [arm for arm in self._arms if standing[device] <= arm.level <= reach]
            log = math.log(max(1, sum(asked.values())))
            best = max(open_, key=lambda arm: (self._index(arm, asked[arm], log), -arm.level, -arm.rank))
            chosen[device], standing[device] = best, best.level
            asked[best] += 1
        return chosen

    def _goal(self) -> int:
        """The level to be on: up from the first, as long as the next is better for certain; -1: the first is new."""
        log = math.log(max(1, sum(self._counts.values())))
        goal, best = -1, -math.inf
        for level in range(self._arms[-1].level + 1):
            arms = [arm for arm in self._arms if arm.level == level]
            if not all(self._counts[arm] for arm in arms):
                break
            if max(self._mean(arm) - self._bonus(self._counts[arm], log) for arm in arms) < best:
                break
            goal, best = level, max(self._mean(arm) for arm in arms)
        return goal

    def _index(self, arm: Arm, asked: int, log: float) -> float:
        return self._mean(arm) + self._bonus(asked, log) if asked else math.inf

    def _mean(self, arm: Arm) -> float:
        """1, the most there is, for what was asked for and has no result yet."""
        return self._sums[arm] / self._counts[arm] if self._counts[arm] else 1.0

    def _bonus(self, times: int, log: float) -> float:
        return self._exploration * math.sqrt(log / times)

    # -- learning ---------------------------------------------------------------------------------------------

    def learn(self, gains: Sequence[tuple[Arm, float]]) -> None:
        """The results of a round, rewarded in [0, 1]: the share of a high one among the last gains."""
        self._recent.extend(gain for _, gain in gains)
        high = _quantile(sorted(self._recent)) if self._recent else 0.0
        for arm, gain in gains:
            self._counts[arm] += 1
            self._sums[arm] += min(1.0, max(0.0, gain / high)) if high > 0 else 0.0

    # -- on disk ----------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Everything it has learnt."""
        return {
            "counts": [self._counts[arm] for arm in self._arms],
            "sums": [self._sums[arm] for arm in self._arms],
            "recent": list(self._recent),
        }

    def from_json(self, content: Mapping[str, Any]) -> "Bandit":
        """Go on from `to_json` of a bandit with the same arms."""
        self._counts = dict(zip(self._arms, content["counts"], strict=True))
        self._sums = dict(zip(self._arms, content["sums"], strict=True))
        self._recent = deque(content["recent"], maxlen=WINDOW)
        return self


def _quantile(ordered: Sequence[float]) -> float:
    return ordered[math.ceil(HIGH * len(ordered)) - 1]
