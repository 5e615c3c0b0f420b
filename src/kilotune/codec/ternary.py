"""Ternary: the largest numbers of an update as signs times one scale: s · sign(x) where |x| is large, else 0.

Source: Yadav et al., "ComPEFT: Compression for Communicating Parameter Efficient Updates via Sparsification and
Quantization", arXiv 2311.13171; scale `mean` as in Sattler et al., "Robust and Communication-Efficient Federated
Learning from Non-IID Data" (STC), arXiv 1903.02891.
Departs: what is compressed is the change of an adapter, not the adapter, whose random start both ends know; with
`scope: tensor` every tensor has numbers and a scale of its own; numbers that are zero are not sent.
Wire: "TRN1" | u32 table checksum | u32 k | u8 b | u32 bytes of places | places as Golomb–Rice gaps | k signs, 1 is
negative, first the highest bit of a byte, filled with zeros | fp32 scales, one or one per tensor; little-endian.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from kilotune.codec import Codec, State, TensorUpdate, Update, WireContext, WireError, _sparse
from kilotune.codec._codes import pack, unpack
from kilotune.codec._frame import check, numels
from kilotune.codec._vector import flatten, rebuild

MAGIC = b"TRN1"


class Ternary(Codec):
    """Three values per tensor, or in all."""

    gives = frozenset({"own_support"})

    density: float = Field(0.2, gt=0, le=1, description="fraction of the numbers that travel; paper: 0.05 to 0.5")
    scale: Literal["std", "mean"] = Field(
        "std", description="alpha · standard deviation before pruning (paper), or alpha · mean magnitude of the kept"
    )
    alpha: float = Field(1.0, gt=0, description="factor of the scale; paper: 0.5 to 10, chosen on validation data")
    scope: Literal["all", "tensor"] = Field("all", description="choose and scale all tensors together, or each")

    @property
    def exact(self) -> bool:
        """No: how well places can be coded depends on where they are."""
        return False

    @property
    def bounded_loss(self) -> bool:
        """With the mean of the kept and no more; a deviation may be far above the numbers it stands for."""
        return self.scale == "mean" and self.alpha <= 1

    def _parts(self, sizes: list[int]) -> list[int]:
        """Numbers under each scale."""
        return [sum(sizes)] if self.scope == "all" else sizes

    def encode(self, update: Update, context: WireContext, state: State) -> bytes:
        """Keeps no state."""
        vector = flatten("ternary", update, context)
        sizes = numels(context.shapes)
        places = _sparse.chosen(vector, self.density, self.scope, sizes)
        scales, start = [], 0
        for size in self._parts(sizes):
            part = vector[start : start + size].astype(np.float64)
            if self.scale == "mean":
                first, last = np.searchsorted(places, [start, start + size])
                part = np.abs(part[places[first:last] - start])
            scales.append(self.alpha * (part.mean() if self.scale == "mean" else part.std()) if part.size else 0.0)
            start += size
        signs = pack(np.signbit(vector[places]).astype(np.uint8), 1)
        return _sparse.write(MAGIC, context.shapes, places) + signs + np.array(scales, "<f4").tobytes()

    def decode(self, payload: bytes, context: WireContext) -> TensorUpdate:
        """Fresh float32 tensors in name order."""
        sizes = numels(context.shapes)
        most = _sparse.most_kept(self.density, self.scope, sizes)
        places, end = _sparse.read("ternary", MAGIC, context.shapes, most, payload)
        parts, middle = self._parts(sizes), end + -(-places.size // 8)
        check("ternary", "length", len(payload), middle + 4 * len(parts))
        signs = unpack("ternary", payload[end:middle], 1, places.size)
        scales = np.frombuffer(payload, "<f4", len(parts), middle).astype(np.float32)
        if not (np.isfinite(scales) & (scales >= 0)).all():
            raise WireError("ternary: got a scale that is negative or not finite. The payload is altered.")
        values = scales[np.searchsorted(np.cumsum(parts), places, side="right")]
        vector = np.zeros(sum(sizes), np.float32)
        vector[places] = np.where(signs, -values, values)
        return rebuild("ternary", vector, context.shapes)

    def predict_bytes(self, update_numel: dict[str, int], num_pairs: int) -> int:
        """A bound: some percent above the entropy of random places and signs."""
        sizes = list(update_numel.values())
        count = _sparse.most_kept(self.density, self.scope, sizes)
        return _sparse.most_bytes(sum(sizes), count) + -(-count // 8) + 4 * len(self._parts(sizes))


METHOD = Ternary
