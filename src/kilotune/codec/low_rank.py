"""Low rank: factor pairs of any rank, every number of them; the rank is in the header.

Source: plain serialization; a rank that differs by client or round is what FLoRA (Wang et al., arXiv 2409.05976) and
    FlexLoRA (Bai et al., arXiv 2402.11505) send.
Wire: "LWR1" | u32 rank r | a `dense` payload of the table in which every pair (`….lora_A.…` (r, in), `….lora_B.…`
    (out, r)) has this rank; little-endian, 25 + width · n bytes. The receiver fills pairs of a lower rank than its own
    up with zeros, and keeps a higher one. Tensors of no pair travel as they are.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from kilotune.codec import Codec, State, TensorUpdate, Update, WireContext, WireError
from kilotune.codec._frame import open_header
from kilotune.codec.dense import Dense
from kilotune.core.factors import component_axes, resized

HEADER = struct.Struct("<4sI")
MAGIC = b"LWR1"


class LowRank(Codec):
    """Pairs of a rank that the receiver does not know beforehand."""

    gives: ClassVar[frozenset[str]] = frozenset({"values", "any_rank"})

    dtype: Literal["fp32", "fp16", "bf16"] = Field("fp16", description="element type on the wire; fp32 loses nothing")

    def encode(self, update: Update, context: WireContext, state: State) -> bytes:
        """Raises WireError for numbers that are not finite or leave the range of the element type."""
        if not isinstance(update, TensorUpdate):
            raise TypeError("low_rank takes tensors, got pairs")
        axes = component_axes(context.shapes)
        ranks = {update.tensors[name].shape[axis] for name, axis in axes.items()} or {0}
        if len(ranks) != 1:
            raise ValueError(f"low_rank: got pairs of ranks {sorted(ranks)}, expected one rank for all.")
        rank = ranks.pop()
        return HEADER.pack(MAGIC, rank) + self._inner.encode(update, _of_rank(context, axes, rank), state)

    def decode(self, payload: bytes, context: WireContext) -> TensorUpdate:
        """Fresh float32 tensors in name order, of the context's rank at least."""
        (rank,) = open_header("low_rank", HEADER, MAGIC, payload)
        axes = component_axes(context.shapes)
        if (rank == 0) != (not axes):
            raise WireError(f"low_rank: got rank {rank} for {len(axes)} factors. The payload is altered.")
        try:
            update = self._inner.decode(payload[HEADER.size :], _of_rank(context, axes, rank))
        except WireError as error:
            raise WireError(f"low_rank of rank {rank}: {error}") from None
        for name, axis in axes.items():
            if rank < context.shapes[name][axis]:
                update.tensors[name] = resized(update.tensors[name], axis, context.shapes[name][axis])
        return update

    def predict_bytes(self, update_numel: dict[str, int], num_pairs: int) -> int:
        """Exact for tensors of these sizes, whatever their rank."""
        return HEADER.size + self._inner.predict_bytes(update_numel, num_pairs)

    @property
    def _inner(self) -> Dense:
        return Dense(dtype=self.dtype)


def _of_rank(context: WireContext, axes: dict[str, int], rank: int) -> WireContext:
    shapes = {
        name: tuple(rank if axes.get(name) == at else side for at, side in enumerate(shape))
        for name, shape in context.shapes.items()
    }
    return replace(context, shapes=shapes)


METHOD = LowRank
