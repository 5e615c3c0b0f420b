"""Accountant: how much privacy a run has spent, for the sampling it really uses, kept on disk.

Rényi accounting and its conversion to (epsilon, delta) are dp-accounting's; here stand which releases there were. A
release is written down before it leaves (`charge`); one that was cut off before it left is the same release when it is
made again (`settle` says that it left), so a crash costs nothing and no resume forgets anything.
"""

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from kilotune.core.errors import RecipeError, RunError
from kilotune.engine.files import write_json
from kilotune.privacy import Privacy

__all__ = ["SPENDING", "Accountant", "Release", "calibrate", "epsilon_of", "round_key", "statement", "with_noise"]

SPENDING = "privacy.json"

# Close together where large budgets have their best order, wide apart where small ones have it.
ORDERS = (*(n / 10 for n in range(11, 30)), *(n / 4 for n in range(12, 40)), *range(10, 48, 2), *range(48, 144, 16))
NOISE_AT_LEAST, TOLERANCE = 0.05, 1e-3


@dataclass(frozen=True)
class Release:
    """One noisy sum over `sample` of `population` units, drawn without replacement (all: no sampling).

    Neighbours: data that differ in one unit being another (`replaces`: the sum moves by up to 2 clip), or in one unit
    being there or not (by up to clip). `noise_multiplier` is in units of clip.
    """

    population: int
    sample: int
    noise_multiplier: float
    replaces: bool

    def __post_init__(self) -> None:
        if not 1 <= self.sample <= self.population or not self.noise_multiplier > 0:
            raise ValueError(f"not a release: {self}")
        if self.sample < self.population and not self.replaces:
            raise ValueError("sampling without replacement is accounted for units that are replaced")

    @property
    def neighbours(self) -> str:
        return "replace one" if self.replaces else "add or remove one"

    @property
    def sampling(self) -> str:
        if self.sample == self.population:
            return f"all {self.population}, no amplification"
        return f"{self.sample} of {self.population}, fixed size, without replacement, in secret"


def _event(release: Release) -> Any:
    from dp_accounting import dp_event

    noise = dp_event.GaussianDpEvent(release.noise_multiplier / (2 if release.replaces else 1))  # per sensitivity
    if release.sample == release.population:
        return noise
    return dp_event.SampledWithoutReplacementDpEvent(release.population, release.sample, noise)


def _fresh(replaces: bool, orders: Sequence[float] = ORDERS) -> Any:
    from dp_accounting import privacy_accountant, rdp

    relation = privacy_accountant.NeighboringRelation
    return rdp.RdpAccountant(orders, relation.REPLACE_ONE if replaces else relation.ADD_OR_REMOVE_ONE)


@lru_cache(maxsize=256)
def _rdp(release: Release) -> np.ndarray:
    """The Rényi divergence of one release at every order."""
    divergence: np.ndarray = _fresh(release.replaces).compose(_event(release)).rdp
    return divergence


def epsilon_of(releases: Sequence[tuple[Release, int]], delta: float) -> float:
    """Epsilon of these releases, each made so many times; divergences add up."""
    if len({release.replaces for release, _ in releases}) > 1:
        raise ValueError("releases for different neighbours do not add up")
    if not releases:
        return 0.0
    from dp_accounting import rdp

    total = np.sum([count * _rdp(release) for release, count in releases], axis=0)
    return float(rdp.compute_epsilon(ORDERS, total, delta)[0])


@lru_cache(maxsize=256)
def calibrate(release: Release, count: int, epsilon: float, delta: float) -> float:
    """The least noise multiplier with which `count` such releases stay within epsilon."""
    from dp_accounting import SelfComposedDpEvent
    from dp_accounting import mechanism_calibration as search

    # With sampling, orders between whole ones are interpolated and high ones are slow; neither changes much here.
    orders = ORDERS if release.sample == release.population else [a for a in ORDERS if a == int(a) and a <= 32]

    def many(noise: float) -> Any:
        return SelfComposedDpEvent(_event(replace(release, noise_multiplier=noise)), count)

    def spent(noise: float) -> float:
        return float(_fresh(release.replaces, orders).compose(many(noise)).get_epsilon(delta))

    if spent(NOISE_AT_LEAST) <= epsilon:
        return NOISE_AT_LEAST
    bracket = search.LowerEndpointAndGuess(NOISE_AT_LEAST, 4.0)
    try:
        found = search.calibrate_dp_mechanism(
            lambda: _fresh(release.replaces, orders), many, epsilon, delta, bracket, tol=TOLERANCE
        )
    except search.NoBracketIntervalFoundError:
        raise RecipeError(
            f"privacy.epsilon: got {epsilon:g} with delta {delta:g} for {count:,} releases, expected a budget that "
            "some noise can keep. Raise epsilon, or plan fewer rounds."
        ) from None
    return float(found) if spent(float(found)) <= epsilon else float(found) + TOLERANCE


class Accountant:
    """Releases so far, in one file that is replaced as a whole."""

    def __init__(self, path: Path, delta: float, budget: float | None, expected: bool = False) -> None:
        """`expected`: releases were made here before, so their file has to be there."""
        self._path, self.delta, self.budget = path, delta, budget
        self._spent: dict[Release, int] = {}
        self._pending: tuple[str, Release, int] | None = None
        self.noise_multiplier: float | None = None  # the one this run began with
        if path.exists():
            self._read()
        elif expected:
            raise RunError(f"{path}: missing, so what was spent is not known. Put it back, or use another --output.")

    def start(self, noise_multiplier: float) -> None:
        """Fix the run's noise."""
        self.noise_multiplier = noise_multiplier
        self._write()

    @property
    def count(self) -> int:
        """Releases so far, one under way included."""
        return sum(count for _, count in self._all())

    def epsilon(self, release: Release | None = None, count: int = 1) -> float:
        """Spent so far; with `release`: what would be spent after `count` of these."""
        return epsilon_of([*self._all(), *([(release, count)] if release else [])], self.delta)

    def affords(self, release: Release, count: int = 1, key: str | None = None) -> bool:
        """Whether `charge` would stay within the budget."""
        if self.budget is None or self._is_pending(key):
            return True
        return self.epsilon(release, count) <= self.budget

    def charge(self, key: str, release: Release, count: int = 1) -> None:
        """Before a release: `key` is the same if, and only if, it is made again because it never left."""
        if self._is_pending(key):
            return
        self._move()
        self._pending = (key, release, count)
        self._write()

    def settle(self, key: str | None = None) -> None:
        """The release under way (with `key`: if it is that one) has left."""
        if self._pending is not None and (key is None or self._is_pending(key)):
            self._move()
            self._write()

    def _is_pending(self, key: str | None) -> bool:
        return self._pending is not None and self._pending[0] == key

    def _move(self) -> None:
        if self._pending is not None:
            _, release, count = self._pending
            self._spent[release] = self._spent.get(release, 0) + count
            self._pending = None

    def _all(self) -> list[tuple[Release, int]]:
        return [*self._spent.items(), *([self._pending[1:]] if self._pending else [])]

    def _write(self) -> None:
        pending = None if self._pending is None else [self._pending[0], [*astuple(self._pending[1]), self._pending[2]]]
        spent = [[*astuple(release), count] for release, count in self._spent.items()]
        content = {"delta": self.delta, "noise_multiplier": self.noise_multiplier, "spent": spent, "pending": pending}
        write_json(self._path, content)

    def _read(self) -> None:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            self.noise_multiplier = content["noise_multiplier"]
            self._spent = dict(map(_counted, content["spent"]))
            if content["pending"] is not None:
                key, entry = content["pending"]
                self._pending = (str(key), *_counted(entry))
        except (ValueError, LookupError, TypeError) as error:
            raise RunError(f"{self._path}: cut or foreign ({error}). Put it back, or use another --output.") from None


def _counted(entry: list[Any]) -> tuple[Release, int]:
    *fields, count = entry
    return Release(*fields), int(count)


# -- of a run ---------------------------------------------------------------------------------------------------------


def round_key(number: int, head: str) -> str:
    """What a release of a round is charged under: made again after the same history it is the same release."""
    return f"{number}:{head}"


def with_noise(release: Release, accountant: Accountant, privacy: Privacy, planned: int) -> Release:
    """The noise this run began with; at its start the recipe's, or the least for the planned number of releases."""
    noise = accountant.noise_multiplier
    if noise is None:
        noise = privacy.noise_multiplier
        if noise is None and privacy.epsilon is not None:
            noise = calibrate(release, planned, privacy.epsilon, privacy.delta)
        accountant.start(cast(float, noise))
    return replace(release, noise_multiplier=cast(float, noise))


def statement(privacy: Privacy, accountant: Accountant, release: Release) -> dict[str, Any]:
    """What may be said of everything released so far."""
    return {
        "unit": privacy.unit,
        "epsilon": accountant.epsilon(),
        "delta": privacy.delta,
        "budget": privacy.epsilon,
        "neighbours": release.neighbours,
        "sampling": release.sampling,
        "clip": privacy.clip,
        "noise_multiplier": release.noise_multiplier,
        "accountant": "Renyi divergences, dp-accounting",
    }
