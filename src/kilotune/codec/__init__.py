"""Codec: an update to bytes and back. The only place where bytes on the wire are made.

Every payload starts with a 4-byte magic of its codec (3 letters and a version digit) and is fully
determined in length by its header, so that a cut, padded or foreign payload is refused.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from kilotune.core.errors import WireError
from kilotune.core.method import Method
from kilotune.core.types import SeedUpdate, State, TensorUpdate, Update, WireContext

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Codec", "SeedUpdate", "State", "TensorUpdate", "Update", "WireContext", "WireError"]


class Codec(Method):
    """Contract. `takes` says which kind of update `encode` accepts: "tensors" or "seeds"."""

    takes: ClassVar[Literal["tensors", "seeds"]] = "tensors"

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

    def carried(self, state: State, root: int) -> State:
        """The part of `state` that still means something in a round of this root; all of it by default."""
        return state

    def expand(self, update: Update, context: WireContext) -> Iterator[tuple[str, Tensor]]:
        """(tensor name, change) pairs of a decoded update, one tensor at a time."""
        if not isinstance(update, TensorUpdate):
            raise TypeError(f"{self.method_name()} cannot expand pairs without a basis")
        yield from update.tensors.items()
