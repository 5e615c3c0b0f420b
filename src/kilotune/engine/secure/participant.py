"""Participant: what secure aggregation adds to a worker: integers, secrets, and answers to three more requests."""

from functools import partial
from pathlib import Path

import numpy as np

from kilotune.core.errors import WireError
from kilotune.core.rng import stream
from kilotune.core.types import Update
from kilotune.engine.composing.plan import Plan
from kilotune.engine.flower.messages import Request
from kilotune.engine.secure.capabilities import grid_of
from kilotune.engine.secure.client import Vault
from kilotune.engine.secure.vectors import flatten
from kilotune.engine.secure.wire import member_id, threshold_of

RECORD = "opened.json"


def new_vault(plan: Plan, genesis: str, client: str, folder: Path | None) -> Vault:
    """A client's secrets; `folder`: where it remembers whose sum it helped to open."""
    least = partial(threshold_of, plan.recipe.secure_aggregation.threshold)
    return Vault(member_id(genesis, client), least, None if folder is None else folder / RECORD)


class Participant:
    """One client of a recipe with secure aggregation."""

    def __init__(self, plan: Plan, client: str, vault: Vault) -> None:
        self._plan, self._client, self._vault = plan, client, vault
        self._grid = grid_of(plan)

    def integers(self, update: Update, num_examples: int, loss: float, number: int) -> bytes:
        """This client's part of the sum. It stays here: only its masked form is ever sent."""
        weight = min(self._plan.aggregation.share(num_examples), self._grid.max_weight)
        rng = stream(self._plan.recipe.seed, "rounding", self._client, number)
        told = loss if self._plan.privacy is None else None
        return self._grid.words(flatten(self._plan, update), weight, told, rng).tobytes()

    def require_keys(self, request: Request) -> None:
        """Raises WireError when this client has no secrets for this attempt, before it trains in vain."""
        self._vault.session(*_attempt(request))

    def masked(self, request: Request, mail: bytes, integers: bytes) -> bytes:
        """What is sent instead."""
        words = np.frombuffer(integers, self._grid.dtype).copy()
        return self._vault.session(*_attempt(request)).mask(mail, words)

    def answer(self, request: Request) -> tuple[bytes, ...]:
        """The payload for a stage beside training."""
        if request.kind == "secure.keys":
            return (self._vault.begin(*_attempt(request)),)
        (asked,) = _one(request)
        session = self._vault.session(*_attempt(request))
        if request.kind == "secure.shares":
            return (session.shares(int(request.body["threshold"]), asked),)
        return (session.reveal(asked),)


def _attempt(request: Request) -> tuple[int, str, str]:
    try:
        return int(request.body["round"]), str(request.body["head"]), str(request.body["attempt"])
    except KeyError as error:
        raise WireError(f"{request.kind}: got no {error}, which secure aggregation needs.") from None


def _one(request: Request) -> tuple[bytes]:
    if len(request.payloads) != 1:
        raise WireError(f"{request.kind}: got {len(request.payloads)} payloads, expected one.")
    return (request.payloads[0],)
