"""Top-k: the numbers of largest magnitude, as Golomb–Rice gaps between their places and the numbers themselves.

Source: Kuo et al., "Federated LoRA with Sparse Communication" (FLASC), arXiv 2406.05233: one mask over all trainable
numbers together; Aji and Heafield, "Sparse Communication for Distributed Gradient Descent", arXiv 1704.05021.
Departs: the bytes of the places are coded and counted; numbers that are zero are not sent; among equal magnitudes the
first places win.
Wire: "TPK1" | u32 table checksum | u32 k | u8 b | u32 bytes of places | places | payload of `values` for one tensor
"values" (k,); little-endian. Places count through all tensors by name.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from kilotune.codec import State, TensorUpdate, Update, WireContext, _sparse
from kilotune.codec._carried import Carried
from kilotune.codec._frame import numels
from kilotune.codec._vector import flatten, nested, opened, rebuild

MAGIC = b"TPK1"


class TopK(Carried):
    """The largest numbers of an update; the others count as zero."""

    gives = frozenset({"own_support"})

    density: float = Field(0.25, gt=0, le=1, description="fraction of the numbers that travel; FLASC uses 1/4 to 1/64")
    scope: Literal["all", "tensor"] = Field("all", description="largest of all tensors together, or of each tensor")

    def encode(self, update: Update, context: WireContext, state: State) -> bytes:
        """Keeps no state."""
        vector = flatten("topk", update, context)
        sizes = numels(context.shapes)
        places = _sparse.chosen(vector, self.density, self.scope, sizes)
        return _sparse.write(MAGIC, context.shapes, places) + nested("topk", self.values, vector[places], context)

    def decode(self, payload: bytes, context: WireContext) -> TensorUpdate:
        """Fresh float32 tensors in name order."""
        sizes = numels(context.shapes)
        most = _sparse.most_kept(self.density, self.scope, sizes)
        places, end = _sparse.read("topk", MAGIC, context.shapes, most, payload)
        sent = opened("topk", self.values, payload[end:], places.size, context)
        vector = np.zeros(sum(sizes), np.float32)
        vector[places] = sent
        return rebuild("topk", vector, context.shapes)

    def predict_bytes(self, update_numel: dict[str, int], num_pairs: int) -> int:
        """A bound: some percent above what random places take."""
        count = _sparse.most_kept(self.density, self.scope, update_numel.values())
        places = _sparse.most_bytes(sum(update_numel.values()), count)
        return places + self.values.predict_bytes({"values": count}, 0)


METHOD = TopK
