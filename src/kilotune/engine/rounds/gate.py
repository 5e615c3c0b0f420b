"""Gate: the last defence. A round that makes the model worse on the server's own rows changes nothing.

The round is tried on the model and taken back bit for bit. When the loss rises by more than `defences.gate`, a change
of zero is committed instead, so that the chain goes on, everybody replays the same, and the ledger says (weight 0) who
had sent what.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from kilotune.core.types import SeedUpdate, State, TensorUpdate, Update
from kilotune.engine.composing.recipe import DefencesSection
from kilotune.engine.rounds.replica import Replica

LOSS = "gate_loss"


class Gate:
    """Objects to rounds; open when the recipe sets no limit or the server has no rows to measure on."""

    def __init__(
        self, section: DefencesSection, replica: Replica, state: State, score: Callable[[], float] | None
    ) -> None:
        """`score` measures the replica as it stands; `state` is part of the server's state."""
        self._limit = section.gate if section.enabled else None
        self._replica, self._state, self._score = replica, state, score

    @property
    def closed(self) -> bool:
        """Whether rounds are tried at all."""
        return self._limit is not None and self._score is not None

    def objection(self, number: int, payload: bytes) -> str | None:
        """Why the round of this payload must not count; None when it may."""
        if self._limit is None or self._score is None:
            return None
        before = float(self._state[LOSS]) if LOSS in self._state else self._score()
        after = self._after(number, payload)
        if math.isfinite(after) and after <= before + self._limit:
            self._state[LOSS] = torch.tensor(after, dtype=torch.float64)
            return None
        self._state[LOSS] = torch.tensor(before, dtype=torch.float64)
        return f"the loss on the server's rows would go from {before:.4f} to {after:.4f}, above the gate"

    def _after(self, number: int, payload: bytes) -> float:
        assert self._score is not None, "measured only where there are rows"
        replica, context = self._replica, self._replica.context(number)
        replica.trainable.begin(context.root)
        try:
            for name, change in replica.changes(replica.plan.downlink.decode(payload, context), context):
                replica.trainable.move(name, change)
            return self._score()
        finally:
            replica.trainable.rollback()


def nothing(like: Update) -> Update:
    """A change of zero, of the same kind."""
    if isinstance(like, SeedUpdate):
        empty = np.zeros(0, np.int64)
        return SeedUpdate(empty, np.zeros(0, np.float32), None if like.groups is None else empty)
    return TensorUpdate({name: torch.zeros_like(tensor) for name, tensor in like.tensors.items()})
