"""Seed and scalar: a change of all weights as n pairs (index of a public direction, coefficient), in their order.

Source: Qin et al., "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under
18 Kilobytes" (FedKSeed), arXiv 2312.06353.
Departs: the coefficient is the step -lr·scalar instead of the scalar, so that step-size schedules replay correctly.
Wire: "SDS1" | u8 dtype of coefficients (0 fp32, 1 fp16) | u8 bytes per index (2 or 4) | u32 n | n indices |
n coefficients; little-endian, 10 + 6·n bytes with fp32 and at most 65,536 directions.
"""

import struct
from typing import Literal

import numpy as np
from pydantic import Field

from kilotune.codec import Codec, SeedUpdate, State, Update, WireContext, WireError
from kilotune.codec._frame import DTYPE_CODES, check, check_finite, check_indices, open_header

HEADER = struct.Struct("<4sBBI")
MAGIC = b"SDS1"
NARROW = 65536  # directions that a 2-byte index can name


def index_width(size: int) -> int:
    """Bytes per index: 2 when the basis is known to be small enough, else 4."""
    return 2 if 0 < size <= NARROW else 4


class SeedScalar(Codec):
    """Pairs in the order of the steps, so that receivers can count every single one."""

    takes = "seeds"
    gives = frozenset({"pairs", "summable"})

    coef_dtype: Literal["fp32", "fp16"] = Field("fp32", description="type of a coefficient; fp32 as in the paper")

    def encode(self, update: Update, context: WireContext, state: State) -> bytes:
        """Raises WireError for coefficients that are not finite or leave the range of their type."""
        if not isinstance(update, SeedUpdate) or update.groups is not None:
            raise TypeError("seed_scalar takes pairs without groups")
        check_indices("seed_scalar", update.indices, context.size)
        check_finite("seed_scalar", "the coefficients", update.coefs)
        width = index_width(context.size)
        with np.errstate(over="ignore"):
            coefs = update.coefs.astype(self._wire())
        if not np.isfinite(coefs).all():
            peak = np.abs(update.coefs).max()
            raise WireError(f"seed_scalar: got {peak:.3g}, expected |coefficient| < 65520. Use codec.coef_dtype: fp32.")
        head = HEADER.pack(MAGIC, DTYPE_CODES[self.coef_dtype], width, update.indices.size)
        return head + update.indices.astype(f"<u{width}").tobytes() + coefs.tobytes()

    def decode(self, payload: bytes, context: WireContext) -> SeedUpdate:
        """Fresh arrays in the order of encoding."""
        code, width, count = open_header("seed_scalar", HEADER, MAGIC, payload)
        wire = np.dtype(self._wire())
        check("seed_scalar", "dtype code", code, DTYPE_CODES[self.coef_dtype])
        check("seed_scalar", "index width", width, index_width(context.size))
        check("seed_scalar", "length", len(payload), HEADER.size + (width + wire.itemsize) * count)
        indices = np.frombuffer(payload, f"<u{width}", count, HEADER.size).astype(np.int64)
        coefs = np.frombuffer(payload, wire, count, HEADER.size + width * count).astype(np.float32)
        check_indices("seed_scalar", indices, context.size)
        check_finite("seed_scalar", "the coefficients", coefs)
        return SeedUpdate(indices, coefs)

    def _wire(self) -> str:
        return "<f2" if self.coef_dtype == "fp16" else "<f4"

    def predict_bytes(self, update_numel: dict[str, int], num_pairs: int) -> int:
        """Exact. `update_numel` may name the size of the basis as "coords"; without it 2-byte indices are assumed."""
        width = 4 if update_numel.get("coords", 0) > NARROW else 2
        return HEADER.size + (width + np.dtype(self._wire()).itemsize) * num_pairs


METHOD = SeedScalar
