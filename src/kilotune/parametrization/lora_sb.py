"""LoRA-SB: w + B R A, B (out, r) and A (r, in) fixed with orthonormal columns and rows, and R (r, r) alone is trained.

r² numbers per weight are trained and sent, and Σ p_k (B R_k A) = B (Σ p_k R_k) A, so that the mean is exact (Fed-SB).
The gradient of R is Bᵀ G Aᵀ, the projection of the weight's gradient G. B and A are the singular vectors of the r
largest singular values of the base weight, and R starts at 0; or, with `start: gradient` on one machine, those of the
first step of full tuning, -first_step · sign(G), and R holds its singular values (LoRA-SB).

Source: Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)
    Federated LoRA Fine-Tuning", arXiv 2502.15436; Ponkshe et al., "Initialization using Update Approximation is a
    Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning" (LoRA-SB), arXiv 2411.19557; the base weight's vectors:
    Bałazy et al., "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", arXiv 2405.17604, sec. 3.
Departs: in a federation the first step would need rows: the authors' code takes all clients' rows together, which is
    what a federation must not do. From the base weight everybody makes the same B and A without a byte.
Bits: decomposed in float64 on one thread and put on a grid of 2^-20, so that the last bits in which two LAPACKs differ
    hardly ever show (a few runs in a thousand); B and A are part of the digest, so where they do it is seen.
Memory: B R beside B, A and R: adapter-sized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from kilotune.core.errors import RecipeError
from kilotune.core.factors import A, factor_pairs
from kilotune.core.lazy import torch
from kilotune.core.linalg import on_grid, truncated_svd
from kilotune.core.rng import stream
from kilotune.parametrization import Directions, Parametrization, Trainable
from kilotune.parametrization._pairs import adapted
from kilotune.parametrization._sb import LoraSbTrainable

if TYPE_CHECKING:
    from torch import Tensor, nn


class LoraSb(Parametrization):
    writes_base: ClassVar[bool] = False
    gives: ClassVar[frozenset[str]] = frozenset({"adapter"})
    example: ClassVar[dict[str, Any]] = {"rank": 16}

    rank: int = Field(32, ge=1, description="r; r² numbers per weight travel; paper: 25 to 200 on larger models")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="linear layers that get B, R and A, by their names; paper: all seven of a layer"
    )
    start: Literal["weight", "gradient"] = Field(
        "weight", description="what B and A are singular vectors of: the base weight, or (tune) the first step"
    )
    first_step: float = Field(
        1e-5, gt=0, description="by how much the first step moves every weight; LoRA-SB's code: lr / warm-up steps"
    )
    rows: int = Field(50, ge=1, description="rows that the first step is made of (LoRA-SB's code: 50)")

    @property
    def looks_at(self) -> int:
        return self.rows if self.start == "gradient" else 0

    def prepare(self, trainable: Trainable, parts: Sequence[Callable[[], Tensor]], seed: int) -> None:
        assert isinstance(trainable, LoraSbTrainable)
        trainable.start_along(parts, self.first_step, seed)

    def attach(self, model: nn.Module, *, basis: Directions | None, seed: int) -> Trainable:
        wrapped, params = adapted(model, seed, self.rank, 1.0, self.targets)
        weights, bases = dict(wrapped.named_parameters()), {}
        for b, a in factor_pairs(params):
            place = a.partition(A)[0]
            weight = weights[f"{place}.base_layer.weight"]
            if self.rank > min(weight.shape):
                raise RecipeError(
                    f"parametrization.rank: got {self.rank}, expected at most {min(weight.shape)}, the smaller side of "
                    f"{place.split('.', 2)[-1]}. Use a lower rank, or other targets."
                )
            u, _, vt = truncated_svd(weight, self.rank, stream(seed, "lora_sb", place))
            bases[b] = on_grid(u)
            params[a].data = on_grid(vt)
            params[b].data = torch.zeros_like(params[b])
        return LoraSbTrainable(wrapped, params, bases)


METHOD = LoraSb
