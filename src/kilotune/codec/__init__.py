"""Codec: an update to bytes and back. The only place where bytes on the wire are made.

Every payload starts with a 4-byte magic of its codec (3 letters and a version digit) and is fully
determined in length by its header, so that a cut, padded or foreign payload is refused.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from kilotune.core.errors import WireError
from kilotune.core.method import Method
from kilotune.core.types import SeedUpdate, State, TensorUpdate, Update, WireContext

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Codec", "SeedUpdate", "State", "TensorUpdate", "Update", "WireContext", "WireError"]


class Codec(Method):
    """Contract. `takes` says which kind of update `encode` accepts: "tensors" or "seeds".

    Words in `gives`. pairs: what it decodes to are pairs, whatever it takes. summable: one number of a fixed meaning
    per place for every client, so that integers under masks may stand in for its own encoding. own_support: each
    sender chooses which numbers it sends. channel_bound: as many as its momentary channel carries. round_bound: a
    payload means something in its own round only. values: every number arrives, or the nearest there is for it, however
    large it is beside its fellows.
    """

    takes: ClassVar[Literal["tensors", "seeds"]] = "tensors"

    @property
    def bare(self) -> Codec:
        """What makes the bytes: the innermost codec where this one only wraps another."""
        return self

    @property
    def traits(self) -> frozenset[str]:
        """`gives` of this codec and of all codecs inside it."""
        return self.gives.union(*(part.traits for _, part in self if isinstance(part, Codec)))

    @property
    def exact(self) -> bool:
        """Whether `predict_bytes` is the length of every payload, not only a bound."""
        return True

    @property
    def remembers(self) -> bool:
        """Whether `encode` uses its state."""
        return False

    @property
    def bounded_loss(self) -> bool:
        """Whether error feedback may go around it: what a round loses does not grow from round to round."""
        return True

    @property
    def cycle(self) -> int:
        """Rounds in which every tensor travels once."""
        return 1

    def travels(self, names: Iterable[str], round: int) -> list[str]:
        """The tensors of which something is sent in a round; all by default."""
        return list(names)

    @abstractmethod
    def encode(self, update: Update, context: WireContext, state: State) -> bytes:
        """The payload. `state` may hold what error feedback carries to the next round (changed in place)."""

    @abstractmethod
    def decode(self, payload: bytes, context: WireContext) -> Update:
        """The update that every receiver applies. Raises WireError for a cut or foreign payload."""

    @abstractmethod
    def predict_bytes(self, update_numel: dict[str, int], num_pairs: int) -> int:
        """Upper bound of len(payload), tight for dense payloads.

        `update_numel`: elements of each tensor of a TensorUpdate; `num_pairs`: pairs of a SeedUpdate.
        """

    def repeats(self, payload: bytes, own: bytes, context: WireContext) -> bool:
        """Whether the payload of a round says of the context's sender nothing but what it sent, `own`; payloads that
        name nobody do."""
        return True

    def carried(self, state: State, root: int) -> State:
        """The part of `state` that still means something in a round of this root; all of it by default."""
        return state

    def expand(self, update: Update, context: WireContext) -> Iterator[tuple[str, Tensor]]:
        """(tensor name, change) pairs of a decoded update, one tensor at a time."""
        if not isinstance(update, TensorUpdate):
            raise TypeError(f"{self.method_name()} cannot expand pairs without a basis")
        yield from update.tensors.items()
