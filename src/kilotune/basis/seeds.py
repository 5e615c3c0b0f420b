"""Seed pool: K independent directions z_k with independent entries of variance 1; change = Σ a_k z_k.

Source: Qin et al., "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost
under 18 Kilobytes" (FedKSeed), arXiv 2312.06353; uniform law: Shu et al., "Ferret: Federated Full-Parameter
Tuning at Scale for Large Language Models", arXiv 2409.06277.
Departs: noise is kilotune's own spec v1 instead of torch's generators, which CPUs and GPUs do not share and
which keep 32 bits of a seed; direction k is an index of the pool, not a drawn seed.
Wire: coordinates are the coefficients; noise law `law`, direction index k (docs/wire.md, noise spec v1).
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, from_numpy

from kilotune.basis import Basis
from kilotune.basis._flat import check_index, flat, flat_out, scatter, vector
from kilotune.core.noise import stream_key
from kilotune.core.types import SeedUpdate


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
        return from_numpy(scatter(update, self.size, "basis.seeds"))

    def direction(self, index: int) -> Tensor:
        """1 at `index`, 0 elsewhere."""
        check_index(index, self.size, "basis.seeds")
        unit = torch.zeros(self.size)
        unit[index] = 1.0
        return unit

    def add(self, weight: Tensor, name: str, steps: list[tuple[int, Tensor]], out: Tensor | None = None) -> Tensor:
        """Per step: float32 sum of a_k z_k over the non-zero a_k in rising k, then one addition to the weight."""
        from kilotune.core import kernels

        where = f"basis.seeds {name}"
        source, (target, flat_target) = flat(weight, where), flat_out(weight, out, where)
        for root, coordinates in steps:
            a = vector(coordinates, self.size, where)
            used = a.nonzero()[0]
            if used.size:
                keys = [stream_key(self.law, root, int(k), name) for k in used]
                kernels.seeds_add(source, flat_target, self.law, keys, a[used])
                source = flat_target
        if source is not flat_target and target is not weight:
            flat_target[:] = source
        return target

    def project(self, gradient: Tensor, name: str, root: int) -> Tensor:
        """(K,) inner products with every direction; float64 sums, rounded once."""
        from kilotune.core import kernels

        keys = [stream_key(self.law, root, k, name) for k in range(self.size)]
        return from_numpy(kernels.seeds_project(flat(gradient, f"basis.seeds {name}"), self.law, keys))


METHOD = Seeds
