"""Costs: bytes that secure aggregation adds, exact while nobody drops out, and seconds from timing its parts here."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from kilotune.engine.secure import shamir, wire
from kilotune.engine.secure.capabilities import grid_of, length
from kilotune.engine.secure.fixed import FRONT
from kilotune.engine.secure.masks import KEY_BYTES, KeyPair, add_mask

if TYPE_CHECKING:
    from kilotune.engine.composing.plan import Plan

WORDS, POINTS, TERMS = 1 << 18, 24, 16  # of the samples that are timed


def masked(
    plan: Plan, numel: dict[str, int], clients: int, up: float, down: float
) -> tuple[float, float, dict[str, float]]:
    """Bytes up and down per client and round, from those without masks; and what is added, for the plan."""
    if not plan.recipe.secure_aggregation.enabled:
        return up, down, {}
    sent, stages = wire.up_bytes(clients, length(plan, numel), grid_of(plan).bits), wire.down_bytes(clients)
    added = {"secure_up_bytes_per_client_round": sent - up, "secure_down_bytes_per_client_round": float(stages)}
    return sent, down + stages, added


def vector_bytes(plan: Plan, numel: dict[str, int]) -> int:
    """Of one masked update."""
    return wire.MAGIC_BYTES + (FRONT + length(plan, numel)) * grid_of(plan).bits // 8


def seconds(plan: Plan, numel: dict[str, int], clients: int) -> float:
    """Processor time of all clients and the server in one round; nothing for the way between them."""
    numbers, dtype = length(plan, numel), grid_of(plan).dtype
    threshold = wire.threshold_of(plan.recipe.secure_aggregation.threshold, clients)
    one, other, secret, words = KeyPair(), KeyPair(), secrets.token_bytes(KEY_BYTES), np.zeros(WORDS, dtype)
    agree = _timed(lambda: one.agree(other.public, secret, b"plan"))
    share = _timed(lambda: shamir.split(secret, POINTS, TERMS)) / (POINTS * TERMS)
    mask = _timed(lambda: add_mask(words, secret, 1)) / WORDS
    client = 3 * (clients - 1) * agree + 2 * clients * threshold * share + clients * numbers * mask
    return clients * client + clients * (threshold * share + numbers * mask)


def _timed(call: Callable[[], object], tries: int = 3) -> float:
    """The least of some tries: others use this machine too."""
    spent = []
    for _ in range(tries):
        started = time.perf_counter()
        call()
        spent.append(time.perf_counter() - started)
    return min(spent)
