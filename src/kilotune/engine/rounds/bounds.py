"""Bounds: what both ends of a round know of an honest client's pairs before any is sent.

No loss on an answer counts for more than ln V + 2, so no slope (L₊ - L₋) / 2ε is larger than (ln V + 2) / 2ε and no
coefficient larger than the learning rate times that. Clients keep to it, the server refuses what breaks it. With
`shared_directions` the server also knows which directions are probed.
"""

import hashlib
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kilotune.core.rng import stream
from kilotune.core.types import SeedUpdate

if TYPE_CHECKING:
    from kilotune.core.trainable import Trainable
    from kilotune.core.types import Update, WireContext
    from kilotune.engine.composing.plan import Plan
    from kilotune.engine.composing.recipe import Recipe

ABOVE_UNIFORM = 2.0  # nats beyond the loss of a uniform guess


def loss_cap(vocabulary: int) -> float:
    """B: what the loss of a token counts for at most."""
    return math.log(vocabulary) + ABOVE_UNIFORM


def vocabulary_of(model: Any) -> int:
    """Tokens a model chooses from."""
    return int(model.config.get_text_config().vocab_size)


def finite(update: "Update") -> bool:
    """Whether every number of an update is one."""
    if isinstance(update, SeedUpdate):
        return bool(np.isfinite(update.coefs).all())
    return all(bool(value.isfinite().all()) for value in update.tensors.values())


def coefficient_limit(plan: "Plan", vocabulary: int, factor: float) -> float | None:
    """Largest |coefficient| of a pair when the schedule multiplies the learning rate by `factor`; None where a client
    measures its rate itself, or sends no pairs of forward passes."""
    epsilon, rate = getattr(plan.estimator, "epsilon", None), plan.optimizer.lr
    if not plan.recipe.defences.enabled or plan.uplink.takes != "seeds" or epsilon is None or rate == "auto":
        return None
    return float(rate) * factor * loss_cap(vocabulary) / (2 * float(epsilon))


def step_stream(recipe: "Recipe", client: str, number: int, step: int) -> np.random.Generator:
    """The draws of one local step: every client's own, or, with `shared_directions`, the same for all."""
    if recipe.shared_directions:
        return stream(recipe.seed, "step", number, step)
    return stream(recipe.seed, "step", client, number, step)


def prescribed(plan: "Plan", trainable: "Trainable", number: int) -> np.ndarray:
    """(local_steps,) int64: the directions that every client probes in a round with `shared_directions`."""
    return _drawn(plan, trainable, number, "", plan.recipe.local_steps)


def probes(plan: "Plan", trainable: "Trainable", number: int, sender: int) -> np.ndarray:
    """(steps,) int64: the directions of all steps that a sender may take in a round, for an uplink whose payloads are
    bound to their senders."""
    return _drawn(plan, trainable, number, _public_name(sender), plan.recipe.most_local_steps)


def _drawn(plan: "Plan", trainable: "Trainable", number: int, client: str, steps: int) -> np.ndarray:
    draws = [trainable.draw(step_stream(plan.recipe, client, number, step)) for step in range(steps)]
    return np.array([direction.index for direction in draws], dtype=np.int64)


# -- senders ----------------------------------------------------------------------------------------------------------


def sender_number(client: str) -> int:
    """What stands for a client in payloads that name their senders: 4 bytes of its name's SHA-256."""
    return int.from_bytes(hashlib.sha256(client.encode()).digest()[:4], "little")


def said_by(client: str, context: "WireContext") -> "WireContext":
    """The context of one client's payload."""
    return replace(context, sender=sender_number(client))


def prober(plan: "Plan", client: str) -> str:
    """Under which name a client draws its directions: its own, or one that the receivers can tell from its number."""
    return _public_name(sender_number(client)) if "sender_bound" in plan.uplink.traits else client


def _public_name(sender: int) -> str:
    return f"{sender:08x}"
