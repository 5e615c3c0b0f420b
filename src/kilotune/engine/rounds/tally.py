"""Tally: what a server keeps of a round's replies, and the step it takes with their mean."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from kilotune.core.types import SeedUpdate, State, TensorUpdate, Update
from kilotune.optimizer import Optimizer


@dataclass
class Tally:
    """Payload bytes and client-rounds so far."""

    up_bytes: int = 0
    down_bytes: int = 0
    client_rounds: int = 0
    peak_rss_bytes: int = 0
    client_digests: dict[str, str] = field(default_factory=dict)

    def count(self, answer: "Answer") -> None:
        """An answer that has come."""
        self.up_bytes += answer.up_bytes
        self.down_bytes += answer.down_bytes
        self.client_rounds += 1


@dataclass(frozen=True, slots=True)
class Answer:
    """What is kept of a reply once its payload is in the sum."""

    client: str
    num_examples: int
    loss: float
    up_bytes: int  # its payload, and what its steps have sent before (split)
    payload_sha256: str
    discount: float = 1.0  # of the weight, for an answer that is late
    down_bytes: int = 0  # what its steps were sent (split)


COUNTED = ("up_bytes", "down_bytes", "client_rounds", "peak_rss_bytes")
"""What of the tally goes on when a run is resumed."""


def outer_step(rule: Optimizer, mean: Update, states: State) -> Update:
    """The server's optimizer takes minus the mean change as a gradient; plain sgd with lr 1 takes the mean."""
    if isinstance(mean, SeedUpdate):
        return replace(mean, coefs=mean.coefs * np.float32(rule.lr))
    stepped = {}
    for name, change in mean.tensors.items():
        prefix = f"{name}/"
        state = {k.removeprefix(prefix): v for k, v in states.items() if k.startswith(prefix)}
        state = state or rule.init(change)
        stepped[name] = rule.update(-change, state, torch.zeros_like(change), float(rule.lr))
        states.update({prefix + k: v for k, v in state.items()})
    return TensorUpdate(stepped)
