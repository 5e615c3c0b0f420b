"""Private rounds: where `privacy:` meets the server of a federation.

Central: updates are clipped as they arrive, summed exactly, divided by the planned cohort, and the noise is in the sum
before anything else sees it: aggregation, server optimizer, FedKSeed-Pro's probabilities and the ledger work on the
noisy mean. The cohort is drawn in secret from the planned clients, present or not, and the ledger names nobody.
Local: clients keep their own accounts (privatesteps.py) and the server goes by what they say of them.
Losses of clients are not told in either case.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kilotune.aggregation import Aggregation, Gathering
from kilotune.core.errors import FederationError, IncompatibleError
from kilotune.core.rng import stream
from kilotune.core.types import SeedUpdate, State, TensorUpdate, Update, WireContext
from kilotune.engine.composing.plan import Plan
from kilotune.engine.privacy.accountant import SPENDING, Accountant, Release, round_key, statement, with_noise
from kilotune.engine.rounds.book import Keep
from kilotune.engine.rounds.ledger import Contribution, Ledger
from kilotune.privacy import Privacy
from kilotune.privacy._secret import generator
from kilotune.privacy.central import Central

__all__ = ["NoisyMean", "Rounds", "private_rounds"]


class Rounds:
    """The server's side of rounds that hide nothing; `private_rounds` gives those that do."""

    tells_clients = True

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def hear(self, client: str, body: Mapping[str, Any]) -> None:
        """A client's reply, whatever it was about."""

    def exhausted(self, roster: list[str]) -> str | None:
        """Why no further round may begin."""
        return None

    def choose(self, number: int, roster: list[str]) -> list[str]:
        """Who trains."""
        return self.plan.schedule.sample(number, roster, stream(self.plan.recipe.seed, "schedule", number))

    def gather(self, context: WireContext) -> Gathering:
        return self.plan.aggregation.gather()

    def keeps(self, asked: Keep) -> Keep:
        """What becomes of the clients' payloads after a round."""
        return asked

    def contributions(self, of: tuple[Contribution, ...]) -> tuple[Contribution, ...]:
        """What the ledger says of who took part."""
        return of

    @contextmanager
    def releasing(self, number: int) -> Iterator[None]:
        """Around the moment that makes a round count."""
        yield

    def facts(self, losses: list[float]) -> dict[str, float]:
        """What a round's event says of its clients: their mean loss, where it may be told."""
        return {"loss": float(np.mean(losses))}

    def summary(self) -> dict[str, Any]:
        """What the run's summary says beside the usual."""
        return {}


class CentralRounds(Rounds):
    tells_clients = False

    def __init__(self, plan: Plan, privacy: Central, ledger: Ledger, path: Path) -> None:
        super().__init__(plan)
        self._privacy, self._ledger = privacy, ledger
        self._names: set[str] = set()
        self._accountant = Accountant(path, privacy.delta, privacy.epsilon, expected=len(ledger) > 0)
        cohort = min(getattr(plan.schedule, "clients_per_round", privacy.clients), privacy.clients)
        self._release = Release(privacy.clients, cohort, 1.0, replaces=cohort < privacy.clients)
        rounds = plan.recipe.rounds or 1
        self._release = with_noise(self._release, self._accountant, privacy, rounds)
        if ledger.records:  # the process ended between the ledger's line and ours
            self._accountant.settle(round_key(len(ledger), ledger.records[-1].previous))

    def exhausted(self, roster: list[str]) -> str | None:
        if self._accountant.affords(self._release, key=round_key(len(self._ledger) + 1, self._ledger.head)):
            return None
        spent, after = self._accountant.epsilon(), self._accountant.epsilon(self._release)
        return f"one more round would spend epsilon {after:.3g} of {self._privacy.epsilon:g} (so far {spent:.3g})"

    def choose(self, number: int, roster: list[str]) -> list[str]:
        """Drawn among the planned clients; who is not there adds nothing, and does not change anybody's chance."""
        self._names.update(roster)
        planned = self._privacy.clients
        if len(self._names) > planned:
            raise FederationError(
                f"privacy.clients: got {planned}, but {len(self._names)} clients are here. Plan for all that may come."
            )
        slots = sorted(self._names) + [f"\x7f{i}" for i in range(planned - len(self._names))]
        present = set(roster)
        return [name for name in self.plan.schedule.sample(number, slots, generator()) if name in present]

    def gather(self, context: WireContext) -> Gathering:
        return NoisyMean(self._privacy, self._release, context, self.plan.aggregation)

    def keeps(self, asked: Keep) -> Keep:
        return "never" if asked == "auto" else asked

    def contributions(self, of: tuple[Contribution, ...]) -> tuple[Contribution, ...]:
        return ()  # a name tells who was drawn, a payload's hash lets a guess of the data be checked

    @contextmanager
    def releasing(self, number: int) -> Iterator[None]:
        self._accountant.charge(round_key(number, self._ledger.head), self._release)
        yield
        self._accountant.settle()

    def facts(self, losses: list[float]) -> dict[str, float]:
        return {"epsilon": self._accountant.epsilon()}

    def summary(self) -> dict[str, Any]:
        told = statement(self._privacy, self._accountant, self._release)
        return {"privacy": {**told, "rounds": self._accountant.count, "divided_by": self._release.sample}}


class LocalRounds(Rounds):
    """Clients keep their own accounts; the server knows what they say of them."""

    def __init__(self, plan: Plan, privacy: Privacy) -> None:
        super().__init__(plan)
        self._privacy = privacy
        self._spent: dict[str, float] = {}
        self._done: set[str] = set()

    def hear(self, client: str, body: Mapping[str, Any]) -> None:
        if "epsilon" in body:
            self._spent[client] = float(body["epsilon"])
        if body.get("budget_left", True):
            self._done.discard(client)
        else:
            self._done.add(client)

    def exhausted(self, roster: list[str]) -> str | None:
        left = [name for name in roster if name not in self._done]
        if len(left) == len(roster) or len(left) >= self.plan.recipe.min_clients:
            return None
        return f"{len(roster) - len(left)} of {len(roster)} clients have spent their epsilon {self._privacy.epsilon:g}"

    def choose(self, number: int, roster: list[str]) -> list[str]:
        return super().choose(number, [name for name in roster if name not in self._done])

    def facts(self, losses: list[float]) -> dict[str, float]:
        return {"epsilon": max(self._spent.values(), default=0.0)}

    def summary(self) -> dict[str, Any]:
        told = {
            "unit": self._privacy.unit,
            **self.facts([]),
            "delta": self._privacy.delta,
            "budget": self._privacy.epsilon,
            "clip": self._privacy.clip,
            "noise_multiplier": self._privacy.noise_multiplier,
            "neighbours": "replace one",
            "sampling": "batches of fixed size, without replacement, in secret; each client's own account",
        }
        return {"privacy": told}


def private_rounds(plan: Plan, ledger: Ledger, folder: Path, clients_measure: bool) -> Rounds:
    """What the recipe's `privacy` asks of the server."""
    if plan.privacy is None:
        return Rounds(plan)
    if clients_measure and plan.recipe.patience:
        raise IncompatibleError(
            f"patience: got {plan.recipe.patience}, but with privacy {plan.privacy.method_name()!r} clients do not "
            "tell their losses. Remove it; privacy.epsilon ends the run."
        )
    if isinstance(plan.privacy, Central):
        return CentralRounds(plan, plan.privacy, ledger, folder / "state" / SPENDING)
    return LocalRounds(plan, plan.privacy)


class NoisyMean(Gathering):
    """Clips and sums updates as they arrive; the aggregation rule gets their noisy mean as if it were one client's."""

    def __init__(self, privacy: Privacy, release: Release, context: WireContext, rule: Aggregation) -> None:
        super().__init__(rule)
        self._privacy, self._release, self._context = privacy, release, context
        self._names = sorted(context.shapes)
        self._of_pairs = rule.takes == "seeds"
        size = context.size if self._of_pairs else sum(math.prod(shape) for shape in context.shapes.values())
        self._total = np.zeros(size, np.int64)

    def add_weighted(self, update: Update, share: float) -> None:
        """Every client counts once, whatever its share."""
        self._shares.append(1.0)
        self._total += self._privacy.contribution(self._flat(update), self._release.noise_multiplier)

    def result(self, state: State) -> Update:
        noisy = self._privacy.release(self._total, self._release.noise_multiplier) / self._release.sample
        gathering = self._rule.gather()
        gathering.add_weighted(self._like_sent(noisy.astype(np.float32)), 1.0)
        return gathering.result(state)

    def _flat(self, update: Update) -> np.ndarray:
        """All numbers of an update; pairs are summed per direction, since what a direction adds up to is what moves."""
        if isinstance(update, SeedUpdate):
            return np.bincount(update.indices, weights=update.coefs.astype(np.float64), minlength=self._total.size)
        return np.concatenate([update.tensors[name].double().numpy().reshape(-1) for name in self._names])

    def _like_sent(self, values: np.ndarray) -> Update:
        """Every direction gets its noise, also those that nobody moved along."""
        if self._of_pairs:
            return SeedUpdate(np.arange(values.size), values)
        sizes = [math.prod(self._context.shapes[name]) for name in self._names]
        parts = np.split(values, np.cumsum(sizes)[:-1])
        tensors = {
            name: torch.from_numpy(part.copy()).reshape(self._context.shapes[name])
            for name, part in zip(self._names, parts, strict=True)
        }
        return TensorUpdate(tensors)
