"""Plan: a composed recipe, the values and the parts built from them. What every other module of the engine is given."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kilotune.core.rng import derive
from kilotune.engine.composing.recipe import CODECS, FEDERATED_ONLY, PARTS, Recipe

if TYPE_CHECKING:
    from kilotune.aggregation import Aggregation
    from kilotune.basis import Basis
    from kilotune.codec import Codec
    from kilotune.estimator import Estimator
    from kilotune.optimizer import Optimizer
    from kilotune.parametrization import Parametrization
    from kilotune.partition import Partition
    from kilotune.privacy import Privacy
    from kilotune.schedule import Schedule

PRIVATE = (
    *("title", "source", "rounds", "steps", "threads", "deadline_s", "min_clients", "patience", "evaluation"),
    "keep_contributions",
)
"""Keys that the two ends of a federation may hold differently; they are no part of the recipe id."""
PRIVATE_DATA = ("path", "eval_path", "only", "limit")


@dataclass(frozen=True)
class Plan:
    """A composed recipe: the values and the parts built from them."""

    recipe: Recipe
    parametrization: Parametrization
    basis: Basis | None
    estimator: Estimator
    optimizer: Optimizer
    uplink: Codec
    downlink: Codec
    aggregation: Aggregation
    server_optimizer: Optimizer
    schedule: Schedule
    partition: Partition | None
    privacy: Privacy | None = None

    @cached_property
    def id(self) -> str:
        """16 hex digits over everything both ends must share."""
        content = {k: v for k, v in self.resolved().items() if k not in PRIVATE}
        content["data"] = {k: v for k, v in content["data"].items() if k not in PRIVATE_DATA}
        content.pop("partition")
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def resolved(self) -> dict[str, Any]:
        """Every value of the recipe, defaults included, as plain JSON data."""
        content = self.recipe.model_dump(mode="json")
        for key in PARTS:
            part = getattr(self, key)
            content[key] = None if part is None else {"name": part.method_name(), **part.model_dump(mode="json")}
        if self.recipe.steps:
            unused = FEDERATED_ONLY if self.parametrization.uses_basis else (*FEDERATED_ONLY, *CODECS)
            content |= dict.fromkeys(key for key in unused if key in PARTS)
        return content

    def root(self, round: int) -> int:
        """The seed of the round's public noise, known to everyone who knows the recipe."""
        fresh = self.basis is None or self.basis.refresh == "round"
        return derive(self.recipe.seed, "root", round if fresh else 0)

    def group_of(self, client: str, roster: list[str]) -> int:
        """Index into recipe.clients for this client, or -1: groups take the clients in order of name."""
        if not self.recipe.clients:
            return -1
        return self.group_at((sorted(roster).index(client) + 0.5) / len(roster))

    def group_at(self, position: float) -> int:
        """The group of the client that has this fraction of all clients before it."""
        start = 0.0
        for index, group in enumerate(self.recipe.clients):
            start += group.share
            if position < start:
                return index
        return -1

    @property
    def num_directions(self) -> int:
        """Directions that pairs may index: the basis' size, or the projection codec's own number of seeds."""
        return self.basis.size if self.basis is not None else int(getattr(self.uplink, "num_seeds", 0))
