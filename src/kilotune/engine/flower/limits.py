"""Limits: how large a message may be before anybody parses it. The bounds of payloads follow from the recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from kilotune.engine.composing.compose import for_group
from kilotune.engine.composing.pairs import numbers_down, rank
from kilotune.engine.flower.messages import TYPES
from kilotune.engine.rounds.ledger import MEMBERS_BYTES
from kilotune.engine.secure.costs import vector_bytes

if TYPE_CHECKING:
    from kilotune.codec import Codec
    from kilotune.engine.composing.plan import Plan

ENVELOPE = 8192
"""Bytes of an HTTP body beside the payloads: facts, seal, the message's metadata and Protobuf's own."""
LARGEST = 2**31 - 1  # no Protobuf message is larger
ROUNDS_AT_LEAST = 1000  # that a newcomer may be sent at once, however few its own recipe asks for
SECURE_BYTES = 128  # per client, of a stage of secure aggregation before and after the vectors (secure/wire.py: 82)


@dataclass(frozen=True)
class Limits:
    """Bytes of all payloads of a message. `up`: replies by the kind of their request, `other` for kinds not named;
    `down`: requests."""

    up: Mapping[str, int] = field(default_factory=dict)
    other: int = 64 << 20
    down: int = LARGEST - ENVELOPE

    def reply(self, kind: str) -> int:
        """Payload bytes of a reply to a request of this kind."""
        return self.up.get(kind, self.other)

    def push(self, kind: str | None) -> int:
        """Body bytes of a client's push while a request of this kind is open for it; without one, of a late reply."""
        payloads = max([self.other, *self.up.values()]) if kind is None else self.reply(kind)
        return min(payloads + ENVELOPE, LARGEST)

    def pull(self) -> int:
        """Body bytes of the answer to a client's poll."""
        return min(self.down + ENVELOPE, LARGEST)


def limits_of(plan: "Plan", shapes: Mapping[str, tuple[int, ...]], clients: int) -> Limits:
    """What messages of this recipe need, for wire tensors of these shapes in a federation of so many clients."""
    numel = {name: prod(shape) for name, shape in shapes.items()}
    plans = [for_group(plan, index) for index in range(-1, len(plan.recipe.clients))]
    up = max(_bound(p.uplink, numel, p.recipe.local_steps) for p in plans)
    if plan.recipe.secure_aggregation.enabled:
        up = vector_bytes(plan, numel)
    summed = plan.num_directions if "apart" not in plan.downlink.traits else 0  # no direction twice
    pairs = summed or plan.recipe.most_local_steps * clients
    part = MEMBERS_BYTES + _bound(plan.downlink, numbers_down(plan, numel, clients * rank(plan)), pairs)
    rounds = max(4 * (plan.recipe.rounds or 0), ROUNDS_AT_LEAST)
    extra = 2 * plan.num_directions  # probabilities
    secure = {kind: SECURE_BYTES * (clients + 1) for kind in TYPES if kind.startswith("secure.")}
    return Limits({"train": up, **secure}, other=0, down=min(rounds * part + extra, LARGEST - ENVELOPE))


def _bound(codec: "Codec", numel: dict[str, int], pairs: int) -> int:
    """Some codecs say what they need for so many pairs, some, asked for none, what they need at most."""
    return max(codec.predict_bytes(numel, pairs), codec.predict_bytes(numel, 0))
