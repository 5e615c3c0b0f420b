"""Arms: how much of its model each device of a round is asked to leave out, and which rank it is asked to train.

The server learns from what devices tell of their rounds: loss on the same rows before and after, and time. The reward
of an arm is (before - after) / max(time / deadline, 1). The device of before had all the units that it had then, the
device of after has those that are left, so what pruning breaks counts against it. In a simulation time is work, counted
in multiply-adds, times the `slowness` of the client's group; deployed it is measured.

Losses and times are the devices' own words: with `share: client` a lie misleads the liar's arms alone.
Everything that is learnt is part of the server's state, and arms follow from it and from who takes part: a resumed
server asks for the same.

Source: Yao, Xu, Xu, Liao and Xie, "Efficient Deployment of Large Language Models on Resource-constrained Devices"
(FedSpine), arXiv 2501.02438; the bandit itself: see `bandit`.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from kilotune.core.lazy import torch
from kilotune.core.types import State
from kilotune.engine.composing.pairs import rank
from kilotune.engine.partial.bandit import Arm, Bandit

if TYPE_CHECKING:
    from kilotune.engine.composing.plan import Plan
    from kilotune.engine.flower.messages import Facts
    from kilotune.engine.rounds.replica import Replica

STATE = "learnt"
SPREAD = 1.3  # of the norms of honest updates beyond what their ranks explain: some have fewer units


@dataclass
class Learnt:
    """What the server knows of its devices."""

    classes: dict[str, Any] = field(default_factory=dict)  # class -> its bandit
    floors: dict[str, int] = field(default_factory=dict)  # client -> level below which it does not go
    paces: dict[str, float] = field(default_factory=dict)  # client -> time for a unit of work

    @classmethod
    def of(cls, state: State) -> "Learnt":
        """What a state holds."""
        return cls(**json.loads(state[STATE].numpy().tobytes())) if STATE in state else cls()

    def to(self, state: State) -> None:
        """Into a state."""
        content = {"classes": self.classes, "floors": self.floors, "paces": self.paces}
        state[STATE] = torch.frombuffer(bytearray(json.dumps(content, sort_keys=True).encode()), dtype=torch.uint8)


class Orders:
    """The server's side. `state` is part of the server's state; all is empty where the recipe has no arms."""

    def __init__(self, plan: "Plan", replica: "Replica", state: State, simulated: bool) -> None:
        self._plan, self._replica, self._state, self._simulated = plan, replica, state, simulated
        self._arms = plan.recipe.arms
        self._works: dict[Arm, int] = {}
        self._group_of: Callable[[str], int] = lambda client: -1
        self._asked: dict[str, Arm] = {}
        self._told: dict[str, Facts] = {}

    def give(self, clients: Iterable[str], group_of: Callable[[str], int]) -> None:
        """A new round: choose for these clients."""
        self._asked, self._told, self._group_of = {}, {}, group_of
        if not self._arms.pruning:
            return
        learnt, members = Learnt.of(self._state), defaultdict[str, dict[str, int]](dict)
        for client in clients:
            members[self._class(client)][client] = learnt.floors.get(client, 0)
        for name, floors in members.items():
            self._asked |= self._bandit(learnt, name).choose(floors)

    def of(self, client: str) -> "Facts":
        """What is asked of a client beside the rest."""
        if client not in self._asked:
            return {}
        arm = self._asked[client]
        return {"pruning": self._arms.pruning[arm.level], "rank": self._arms.ranks[arm.rank]}

    def note(self, client: str, facts: Mapping[str, Any]) -> None:
        """What a client tells of its round."""
        if self._arms.pruning:
            self._told[client] = dict(facts)

    def settle(self, counted: Iterable[str]) -> None:
        """The round is over: learn from those whose answers count."""
        if not self._asked:
            return
        learnt, gains = Learnt.of(self._state), defaultdict[str, list[tuple[Arm, float]]](list)
        arms = {client: arm for client in sorted(counted) if (arm := self._arm(client)) is not None}
        for client, arm in arms.items():
            learnt.paces[client] = self._pace(client, arm)
        for client, arm in (self._asked | arms).items():
            learnt.floors[client] = max(learnt.floors.get(client, 0), arm.level)
        for client, arm in arms.items():
            gains[self._class(client)].append((arm, self._gain(client) / self._lateness(learnt, client, arm)))
        for name, results in gains.items():
            bandit = self._bandit(learnt, name)
            bandit.learn(results)
            learnt.classes[name] = bandit.to_json()
        learnt.to(self._state)

    def _class(self, client: str) -> str:
        return client if self._arms.share == "client" else str(self._group_of(client))

    def _bandit(self, learnt: Learnt, name: str) -> Bandit:
        new = Bandit(len(self._arms.pruning), len(self._arms.ranks), self._arms.exploration)
        return new.from_json(learnt.classes[name]) if name in learnt.classes else new

    def _arm(self, client: str) -> Arm | None:
        """The arm that a client has followed, by its own words; None where these say nothing that can be used."""
        told = self._told.get(client, {})
        values = [told.get(key) for key in ("pruning", "rank", "loss_first", "loss", "seconds")]
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            return None
        share, rank, *_, seconds = values
        if share not in self._arms.pruning or rank not in self._arms.ranks or not seconds > 0:  # type: ignore[operator]
            return None
        return Arm(self._arms.pruning.index(share), self._arms.ranks.index(rank))

    def _gain(self, client: str) -> float:
        return float(self._told[client]["loss_first"]) - float(self._told[client]["loss"])

    def _pace(self, client: str, arm: Arm) -> float:
        if self._simulated:
            group = self._group_of(client)
            return 1.0 if group < 0 else self._plan.recipe.clients[group].slowness
        return float(self._told[client]["seconds"]) / self._work(arm)

    def _lateness(self, learnt: Learnt, client: str, arm: Arm) -> float:
        """Time of a client's round in deadlines, at least 1."""
        whole = median(learnt.paces.values()) * self._work(Arm(0, 0))
        return max(1.0, learnt.paces[client] * self._work(arm) / (self._arms.deadline * whole))

    def _work(self, arm: Arm) -> float:
        """Of a step, in that of the first arm."""
        from kilotune.engine.partial import pruning  # loads torch, for which composing a recipe does not wait

        if not self._works:
            model = self._replica.model
            blocks = pruning.blocks_of(model)
            self._works = {
                Arm(i, j): pruning.work(model, blocks, share, rank)
                for i, share in enumerate(self._arms.pruning)
                for j, rank in enumerate(self._arms.ranks)
            }
        return self._works[arm] / self._works[Arm(0, 0)]


def arm_clashes(plan: "Plan") -> list[str]:
    """What devices of changing sizes do not go with."""
    recipe, arms = plan.recipe, plan.recipe.arms
    if not arms.pruning and not arms.ranks:
        if any(group.slowness != 1.0 for group in recipe.clients):
            return ["clients.slowness: has no effect without arms. Remove it, or use recipe fedspine."]
        return []
    problems = [
        f"arms.{key}: got {list(values)}, expected values that rise, at least one."
        for key, values in (("pruning", arms.pruning), ("ranks", arms.ranks))
        if not values or list(values) != sorted(set(values))
    ]
    needs_pair = "fresh_start" not in plan.parametrization.gives or "kept_units" not in plan.aggregation.gives
    if needs_pair:
        problems.append(
            f"arms: parametrization {plan.parametrization.method_name()!r} with aggregation "
            f"{plan.aggregation.method_name()!r} cannot combine devices of different units. Use parametrization: "
            "lora_merged with aggregation: kept_units."
        )
    elif arms.ranks and arms.ranks[-1] != rank(plan):
        problems.append(
            f"arms.ranks: got {arms.ranks[-1]} as the largest, expected parametrization.rank = {rank(plan)}."
        )
    least = _least_norm_factor(arms.ranks)
    if recipe.defences.enabled and recipe.defences.norm_factor < least:
        problems.append(
            f"defences.norm_factor: got {recipe.defences.norm_factor}, expected at least {least:.1f}: an honest update "
            "grows with the square root of its rank."
        )
    return problems + [f"arms: {why}" for why, applies in _faults(plan).items() if applies]


def _least_norm_factor(ranks: tuple[int, ...]) -> float:
    return SPREAD * math.sqrt(max(ranks) / min(ranks)) if ranks else 1.0


def _faults(plan: "Plan") -> dict[str, bool]:
    recipe = plan.recipe
    return {
        "the server learns from what single devices tell, which secure_aggregation hides. Use --set "
        "secure_aggregation.enabled=false.": recipe.secure_aggregation.enabled,
        "the server learns from the devices' losses, which privacy hides. Remove one of them.": (
            plan.privacy is not None
        ),
        "adapt_steps answers to slowness, too. Use --set adapt_steps=false.": recipe.adapt_steps,
        "what comes late was asked for by a server that knew less. Use --set staleness.max=0.": (
            recipe.staleness.max > 0
        ),
        "an optimizer's memory has the shape of one round's units. Use --set keep_optimizer=false.": (
            recipe.keep_optimizer
        ),
        "clients that hold parts of the model have no units to choose from. Use it without split and emulator.": (
            recipe.split.enabled or recipe.emulator.active
        ),
        "ranks are the server's to choose. Remove clients.rank and every ranks of matrices.": any(
            group.rank or group.ranks for group in recipe.clients
        )
        or bool(getattr(plan.parametrization, "ranks", {})),
    }
