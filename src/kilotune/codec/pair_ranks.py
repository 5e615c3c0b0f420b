"""Pair ranks: factor pairs, each with a rank of its own; of a pair of rank 0 nothing travels but this.

Source: plain serialization; matrices and ranks that differ by client are what FedPipe sends ("Automated Federated
    Pipeline for Parameter-Efficient Fine-Tuning of Large Language Models").
Wire: "PRK1" | u32 table checksum | u16 ρ for every pair in order of A's names and for every other tensor by name, which
    travels whole (1) or not (0) | payload of `values` for one tensor "values" (k,): tensors by name, of a pair the
    first ρ components; little-endian. What does not travel is zero; ρ ends with the last component that is not.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import field_validator

from kilotune.codec import State, TensorUpdate, Update, WireContext, WireError
from kilotune.codec._carried import Carried
from kilotune.codec._frame import check, in_name_order, open_header, table_checksum
from kilotune.codec._ranks import filled, fixed_length, modules, num_modules, places
from kilotune.codec._vector import flatten, nested, opened, rebuild

if TYPE_CHECKING:
    from torch import Tensor

HEADER = struct.Struct("<4sI")
MAGIC = b"PRK1"
COUNT = np.dtype("<u2")


class PairRanks(Carried):
    """The first components of every pair."""

    gives: ClassVar[frozenset[str]] = frozenset({"values", "any_rank", "rank_each", "own_support"})

    _fixed = field_validator("values")(fixed_length)

    def encode(self, update: Update, context: WireContext, state: State) -> bytes:
        """Keeps no state."""
        if not isinstance(update, TensorUpdate):
            raise TypeError("pair_ranks takes tensors, got pairs")
        tensors = filled(update, context.shapes)
        vector = flatten("pair_ranks", TensorUpdate(tensors), context)
        counts = np.array([_used(names, tensors) for names, _ in modules(context.shapes)], COUNT)
        header = HEADER.pack(MAGIC, table_checksum(in_name_order(context.shapes)))
        sent = vector[places(context.shapes, counts)]
        return header + counts.tobytes() + nested("pair_ranks", self.values, sent, context)

    def decode(self, payload: bytes, context: WireContext) -> TensorUpdate:
        """Fresh float32 tensors in name order, of the context's rank."""
        (table,) = open_header("pair_ranks", HEADER, MAGIC, payload)
        check("pair_ranks", "table checksum", table, table_checksum(in_name_order(context.shapes)))
        known = modules(context.shapes)
        end = HEADER.size + COUNT.itemsize * len(known)
        if len(payload) < end:
            raise WireError(f"pair_ranks: got {len(payload)} bytes, expected {end} or more. The payload is cut.")
        counts = np.frombuffer(payload, COUNT, len(known), HEADER.size)
        if (counts > [components for _, components in known]).any():
            raise WireError("pair_ranks: got more components than a pair has. The payload is altered.")
        kept = places(context.shapes, counts)
        vector = np.zeros(kept.size, np.float32)
        vector[kept] = opened("pair_ranks", self.values, payload[end:], int(kept.sum()), context)
        return rebuild("pair_ranks", vector, context.shapes)

    def length(self, modules: int, numbers: int) -> int:
        """Bytes of a payload with so many numbers."""
        return HEADER.size + COUNT.itemsize * modules + self.values.predict_bytes({"values": numbers}, 0)

    def predict_bytes(self, update_numel: dict[str, int], num_pairs: int) -> int:
        """Exact where no component is zero; a tensor of 0 numbers is one that is not there."""
        return self.length(num_modules(update_numel), sum(update_numel.values()))


def _used(names: tuple[str, ...], tensors: dict[str, Tensor]) -> int:
    """Components up to the last one that is not zero."""
    values = [tensors[name].detach() for name in names]
    if len(values) == 1:
        return int(values[0].ne(0).any())
    b, a = values
    alive = (b.ne(0).any(0) | a.ne(0).any(1)).nonzero()
    return int(alive.max()) + 1 if alive.numel() else 0


METHOD = PairRanks
