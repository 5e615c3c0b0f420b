"""Fragments: one part of the tensors travels in a round, every part once in `count` rounds; the rest stays.

Layers are dealt out in turn (strided), so that every fragment has shallow and deep ones; what belongs to no layer makes
one more group at the end.

Source: Douillard et al., "Streaming DiLoCo with overlapping communication: Towards a Distributed Free Lunch", arXiv
2501.18512: strided fragments.
Wire: "FRG1" | u32 table checksum of all tensors | payload of the codec inside for the round's fragment; 8 bytes more.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, field_validator

from kilotune.codec import Codec, State, TensorUpdate, Update, WireContext, WireError
from kilotune.codec._frame import check, in_name_order, open_header, table_checksum
from kilotune.codec._vector import plain
from kilotune.codec.dense import Dense
from kilotune.core.lazy import torch
from kilotune.core.nested import Nested

if TYPE_CHECKING:
    from torch import Tensor

HEADER = struct.Struct("<4sI")
MAGIC = b"FRG1"


def groups(names: Iterable[str]) -> dict[str, int]:
    """Tensor -> its layer, the first number in its name, counted without gaps; no number: one beyond the last."""
    found = {name: re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in names}
    layers = sorted({int(match[1]) for match in found.values() if match})
    return {name: layers.index(int(match[1])) if match else len(layers) for name, match in found.items()}


class Fragments(Codec):
    """Another codec around a round's share of the tensors."""

    gives = frozenset({"round_bound"})
    example: ClassVar[dict[str, Any]] = {"count": 1}

    codec: Annotated[Codec, Nested("codec")] = Field(
        default_factory=Dense, description="what makes the bytes of the fragment"
    )
    count: int = Field(4, ge=1, le=4096, description="fragments; a fragment of 3 layers in the paper")

    @field_validator("codec")
    @classmethod
    def _of_tensors(cls, codec: Codec) -> Codec:
        plain(codec.bare)
        return codec

    @property
    def exact(self) -> bool:
        """Not when fragments differ in size."""
        return self.codec.exact and self.count == 1

    @property
    def remembers(self) -> bool:
        """As the codec inside."""
        return self.codec.remembers

    @property
    def bounded_loss(self) -> bool:
        """What does not travel is not lost: clients go on from it."""
        return False

    @property
    def cycle(self) -> int:
        """Rounds in which every tensor travels once."""
        return self.count

    def travels(self, names: Iterable[str], round: int) -> list[str]:
        """The tensors of the round's fragment; rounds count from 1."""
        return [name for name, group in groups(names).items() if group % self.count == (round - 1) % self.count]

    def encode(self, update: Update, context: WireContext, state: State) -> bytes:
        """The update may hold the round's fragment alone."""
        if not isinstance(update, TensorUpdate):
            raise TypeError("fragments takes tensors, got pairs")
        part = self._part(context)
        inside = self.codec.encode(TensorUpdate({name: update.tensors[name] for name in part.shapes}), part, state)
        return HEADER.pack(MAGIC, table_checksum(in_name_order(context.shapes))) + inside

    def decode(self, payload: bytes, context: WireContext) -> TensorUpdate:
        """All tensors in name order; zeros for those that did not travel."""
        shapes = in_name_order(context.shapes)
        (table,) = open_header("fragments", HEADER, MAGIC, payload)
        check("fragments", "table checksum", table, table_checksum(shapes))
        try:
            update = self.codec.decode(payload[HEADER.size :], self._part(context))
        except WireError as error:
            raise WireError(f"fragments: {error}") from None
        assert isinstance(update, TensorUpdate), "the codec inside decodes to tensors"
        sent = update.tensors
        return TensorUpdate({n: sent[n] if n in sent else torch.zeros(shape) for n, shape in shapes.items()})

    def expand(self, update: Update, context: WireContext) -> Iterator[tuple[str, Tensor]]:
        """The tensors that travelled."""
        assert isinstance(update, TensorUpdate), "fragments decode to tensors"
        for name in self.travels(update.tensors, context.round):
            yield name, update.tensors[name]

    def predict_bytes(self, update_numel: dict[str, int], num_pairs: int) -> int:
        """Of the largest fragment."""
        parts = [{n: update_numel[n] for n in self.travels(update_numel, at + 1)} for at in range(self.count)]
        return HEADER.size + max(self.codec.predict_bytes(part, num_pairs) for part in parts)

    def carried(self, state: State, root: int) -> State:
        """As the codec inside."""
        return self.codec.carried(state, root)

    def _part(self, context: WireContext) -> WireContext:
        names = self.travels(context.shapes, context.round)
        return replace(context, shapes={name: context.shapes[name] for name in names})


METHOD = Fragments
