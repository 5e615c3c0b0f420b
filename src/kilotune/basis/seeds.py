"""Seed pool: K independent directions z_k with independent entries of variance 1; change = Σ a_k z_k.

Source: Qin et al., "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost
under 18 Kilobytes" (FedKSeed), arXiv 2312.06353; uniform law: Shu et al., "Ferret: Federated Full-Parameter
Tuning at Scale for Large Language Models", arXiv 2409.06277.
Departs: noise is kilotune's own spec v1 instead of torch's generators, which CPUs and GPUs do not share and
which keep 32 bits of a seed; direction k is an index of the pool, not a drawn seed.
Wire: coordinates are the coefficients; noise law `law`, direction index k (docs/wire.md, noise spec v1).
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from kilotune.basis import Basis, Int8
from kilotune.basis._flat import check_index, check_start, flat, flat_out, flat_weight, scatter, vector
from kilotune.core.lazy import torch
from kilotune.core.noise import stream_key
from kilotune.core.types import SeedUpdate

if TYPE_CHECKING:
    from torch import Tensor


class Seeds(Basis):
    """Every direction costs one pass of fresh noise over the weights; `sign` is the cheapest law."""

    size: int = Field(4096, ge=1, description="K, directions in the pool (FedKSeed's code: 4096)")
    refresh: Literal["round", "run"] = Field("run", description="one pool for the whole run (FedKSeed), or one a round")
    scale: Literal["rms", "none"] = Field("none", description="share of a tensor: 1 (FedKSeed), or rms of its weights")
    law: Literal["gaussian", "sign", "uniform"] = Field(
        "gaussian", description="law of the entries, variance 1 each (FedKSeed: gaussian)"
    )

    def coordinates(self, update: SeedUpdate) -> Tensor:
        """The coefficients summed by direction."""
        return torch.from_numpy(scatter(update, self.size, "basis.seeds"))

    def direction(self, index: int) -> Tensor:
        """1 at `index`, 0 elsewhere."""
        check_index(index, self.size, "basis.seeds")
        unit = torch.zeros(self.size)
        unit[index] = 1.0
        return unit

    def add(
        self,
        weight: Tensor | Int8,
        name: str,
        steps: list[tuple[int, Tensor]],
        out: Tensor | None = None,
        start: int = 0,
    ) -> Tensor:
        """Per step: float32 sum of a_k z_k over the non-zero a_k in rising k, then one addition to the weight."""
        from kilotune.core import kernels

        where = f"basis.seeds {name}"
        check_start(start, where)
        target, flat_target = flat_out(weight, out, where)
        moves = []
        for root, group in groupby(steps, key=lambda step: step[0]):  # one pool for the run: its noise is made once
            a = np.stack([vector(coordinates, self.size, where) for _, coordinates in group])
            a = a[a.any(axis=1)]  # a weight of -0 stays one where there is nothing to add
            used = np.flatnonzero(a.any(axis=0))
            if used.size:
                moves.append(([stream_key(self.law, root, int(k), name) for k in used], a[:, used]))
        kernels.seeds_add(flat_weight(weight, where), flat_target, self.law, moves, start)
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
        """Like `add`, but the noise of each direction is made once for both."""
        from kilotune.core import kernels

        where = f"basis.seeds {name}"
        check_start(start, where)
        opposite = -coordinates if opposite is None else opposite
        a = np.stack([vector(coordinates, self.size, where), vector(opposite, self.size, where)])
        if not a.any(axis=1).all():  # `add` leaves a weight of -0 alone where there is nothing to add
            self.add(weight, name, [(root, coordinates)], plus, start)
            self.add(weight, name, [(root, opposite)], minus, start)
            return
        used = np.flatnonzero(a.any(axis=0))
        keys = [stream_key(self.law, root, int(k), name) for k in used]
        outs = flat_out(weight, plus, where)[1], flat_out(weight, minus, where)[1]
        kernels.seeds_both(flat_weight(weight, where), *outs, self.law, keys, a[:, used], start)

    def project(self, gradient: Tensor, name: str, root: int) -> Tensor:
        """(K,) inner products with every direction; float64 sums, rounded once."""
        from kilotune.core import kernels

        keys = [stream_key(self.law, root, k, name) for k in range(self.size)]
        return torch.from_numpy(kernels.seeds_project(flat(gradient, f"basis.seeds {name}"), self.law, keys))


METHOD = Seeds
