"""Random-k: a public random choice of the numbers, so that only their values travel.

Source: Stich et al., "Sparsified SGD with Memory", arXiv 1809.07599 (rand-k); with `unbiased` the compressor of
Huang et al., "Stochastic Controlled Averaging for Federated Learning with Communication Compression", arXiv 2308.08165.
Departs: all clients of a round send the same numbers, so that the mean of what they send is the mean of them all.
Wire: "RDK1" | u32 table checksum | payload of `values` for one tensor "values" (k,); little-endian. k = density · n
rounded half to even, at least 1. The places are those of the k largest elements of the uniform noise of (root, index =
round, name "randomk") over n elements, tensors by name; among equal elements the first places win.
"""

from __future__ import annotations

import struct

import numpy as np
from pydantic import Field

from kilotune.codec import State, TensorUpdate, Update, WireContext, _sparse
from kilotune.codec._carried import Carried
from kilotune.codec._frame import check, in_name_order, numels, open_header, table_checksum
from kilotune.codec._vector import flatten, largest, nested, opened, rebuild
from kilotune.core.noise import noise

HEADER = struct.Struct("<4sI")
MAGIC = b"RDK1"


class RandomK(Carried):
    """Some numbers of an update; the others count as zero."""

    gives = frozenset({"round_bound"})

    density: float = Field(0.25, gt=0, le=1, description="fraction of the numbers that travel")
    unbiased: bool = Field(
        True, description="multiply by n / k, so that the mean over choices is the update; not with a residual"
    )

    @property
    def exact(self) -> bool:
        """As what carries the numbers."""
        return self.values.exact

    @property
    def bounded_loss(self) -> bool:
        """Not when numbers are multiplied: what is sent too much of would come back larger."""
        return self.values.bounded_loss and not self.unbiased

    def places(self, context: WireContext) -> np.ndarray:
        """(k,) rising places of this round."""
        total = sum(numels(context.shapes))
        law = noise("uniform", context.root, context.round, "randomk", 0, total)
        return largest(law, _sparse.num_kept(self.density, total))

    def encode(self, update: Update, context: WireContext, state: State) -> bytes:
        """Keeps no state."""
        vector = flatten("randomk", update, context)
        head = HEADER.pack(MAGIC, table_checksum(in_name_order(context.shapes)))
        return head + nested("randomk", self.values, vector[self.places(context)], context)

    def decode(self, payload: bytes, context: WireContext) -> TensorUpdate:
        """Fresh float32 tensors in name order."""
        (table,) = open_header("randomk", HEADER, MAGIC, payload)
        check("randomk", "table checksum", table, table_checksum(in_name_order(context.shapes)))
        total = sum(numels(context.shapes))
        count = _sparse.num_kept(self.density, total)
        sent = opened("randomk", self.values, payload[HEADER.size :], count, context)
        if self.unbiased:
            with np.errstate(over="ignore"):
                sent = (sent.astype(np.float64) * (total / max(count, 1))).astype(np.float32)
        vector = np.zeros(total, np.float32)
        vector[self.places(context)] = sent
        return rebuild("randomk", vector, context.shapes)

    def predict_bytes(self, update_numel: dict[str, int], num_pairs: int) -> int:
        """As exact as what carries the numbers."""
        count = _sparse.num_kept(self.density, sum(update_numel.values()))
        return HEADER.size + self.values.predict_bytes({"values": count}, 0)


METHOD = RandomK
