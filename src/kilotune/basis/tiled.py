"""Tiled basis: z_k[i] = s[i] · H[k, i mod M], s the ±1 noise of a tensor, H the M×M Walsh–Hadamard matrix.

Source: ours. The random signs times a Hadamard row are those of the fast Johnson–Lindenstrauss transform
(Ailon and Chazelle, "Approximate nearest neighbors and the fast Johnson-Lindenstrauss transform", 2006).
Every z_k has ±1 entries and E[z zᵀ] = I over s; directions are orthogonal within each full tile of M elements.
Coordinates are u = Hᵀ a, so any sum Σ a_k z_k is one pass w[i] += s[i] · u[i mod M], however many directions.
Wire: coordinates travel, not pairs; noise law "sign", direction index 0 (docs/wire.md, noise spec v1).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from kilotune.basis import Basis, Int8
from kilotune.basis._flat import check_index, check_start, flat, flat_out, flat_weight, scatter, vector
from kilotune.core.lazy import torch
from kilotune.core.noise import stream_key
from kilotune.core.types import SeedUpdate

if TYPE_CHECKING:
    from torch import Tensor


_key = lru_cache(maxsize=1 << 14)(stream_key)  # asked for again with every block of a tensor


class Tiled(Basis):
    """One sign per element, shared by all directions; M = size numbers describe a change of every weight."""

    one_pass: ClassVar[bool] = True

    size: int = Field(4096, ge=1, description="M, a power of two: coordinates sent per tensor group (ours)")
    refresh: Literal["round", "run"] = Field(
        "round", description="fresh signs each round (ours), or one set for the run"
    )
    scale: Literal["rms", "none"] = Field("rms", description="share of a tensor: rms of its base weights (ours), or 1")

    @field_validator("size")
    @classmethod
    def _power_of_two(cls, size: int) -> int:
        if size & (size - 1):
            below = 1 << (size.bit_length() - 1)
            raise ValueError(f"got {size}, expected a power of two. Use {below} or {2 * below}.")
        return size

    def coordinates(self, update: SeedUpdate) -> Tensor:
        """u = Hᵀ a in float32 butterflies, a the float32 sums of the pairs' coefficients."""
        from kilotune.core import kernels

        return torch.from_numpy(kernels.fwht(scatter(update, self.size, "basis.tiled")))

    def direction(self, index: int) -> Tensor:
        """Row `index` of H: (-1)^popcount(index & j)."""
        check_index(index, self.size, "basis.tiled")
        parity = np.arange(self.size, dtype=np.uint64) & np.uint64(index)
        for shift in (32, 16, 8, 4, 2, 1):
            parity ^= parity >> np.uint64(shift)
        return torch.from_numpy((1 - 2 * (parity & np.uint64(1)).astype(np.int64)).astype(np.float32))

    def add(
        self,
        weight: Tensor | Int8,
        name: str,
        steps: list[tuple[int, Tensor]],
        out: Tensor | None = None,
        start: int = 0,
    ) -> Tensor:
        """w[i] += s[i] · u[i mod M], step after step, each addition rounded to float32; one pass over memory."""
        from kilotune.core import kernels

        where = f"basis.tiled {name}"
        check_start(start, where)
        target, flat_target = flat_out(weight, out, where)
        moves = [(_key("sign", root, 0, name), vector(u, self.size, where)) for root, u in steps]
        kernels.tiled_add(flat_weight(weight, where), flat_target, moves, start)
        return target

    def add_both(
        self,
        weight: Tensor | Int8,
        name: str,
        root: int,
        coordinates: Tensor,
        plus: Tensor,
        minus: Tensor,
        start: int = 0,
        opposite: Tensor | None = None,
    ) -> None:
        """w[i] ± s[i] · u[i mod M]: signs and weights are made and read once."""
        from kilotune.core import kernels

        where = f"basis.tiled {name}"
        check_start(start, where)
        opposite = -coordinates if opposite is None else opposite
        us = vector(coordinates, self.size, where), vector(opposite, self.size, where)
        outs = flat_out(weight, plus, where)[1], flat_out(weight, minus, where)[1]
        kernels.tiled_both(flat_weight(weight, where), *outs, _key("sign", root, 0, name), us, start)

    def project(self, gradient: Tensor, name: str, root: int) -> Tensor:
        """v[j] = Σ_{i ≡ j mod M} s[i] · g[i], the gradient of u; float64 sums, rounded once."""
        from kilotune.core import kernels

        g = flat(gradient, f"basis.tiled {name}")
        return torch.from_numpy(kernels.tiled_project(g, _key("sign", root, 0, name), self.size))


METHOD = Tiled
