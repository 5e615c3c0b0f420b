"""LoRA-SB: w + B R A, B (out, r) and A (r, in) fixed with orthonormal columns and rows, and R (r, r) alone is trained.

r² numbers per weight are trained and sent, and Σ p_k (B R_k A) = B (Σ p_k R_k) A, so that the mean is exact (Fed-SB).
The gradient of R is Bᵀ G Aᵀ, the projection of the weight's gradient G. B and A are the singular vectors of the r
largest singular values of the base weight, and R starts at 0.

Source: Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)
    Federated LoRA Fine-Tuning", arXiv 2502.15436; Ponkshe et al., "Initialization using Update Approximation is a
    Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning" (LoRA-SB), arXiv 2411.19557; the base weight's vectors:
    Bałazy et al., "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", arXiv 2405.17604, sec. 3.
Departs: LoRA-SB takes the vectors of the first step of full fine-tuning, and R from its singular values. That step
    needs rows: the authors' code takes all clients' rows together, which is what a federation must not do. From the
    base weight everybody makes the same B and A without a byte. R = 0, so that the tuned model starts as the base.
Bits: decomposed in float64 on one thread and put on a grid of 2^-20, so that the last bits in which two LAPACKs differ
    hardly ever show (a few runs in a thousand); B and A are part of the digest, so where they do it is seen.
Memory: B R beside B, A and R: adapter-sized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from kilotune.core.errors import RecipeError
from kilotune.core.factors import A, factor_pairs
from kilotune.core.lazy import torch
from kilotune.core.linalg import on_grid, truncated_svd
from kilotune.core.rng import stream
from kilotune.parametrization import Direction, Directions, Parametrization, Sink, Trainable
from kilotune.parametrization._direct import DirectTrainable
from kilotune.parametrization._pairs import adapted

if TYPE_CHECKING:
    from torch import Tensor, nn

R = ".lora_R"


class LoraSbTrainable(DirectTrainable):
    """A LoRA adapter with the factors A and B R: gradients of B R become those of R, and B R follows R."""

    accumulates = False

    def __init__(self, model: nn.Module, params: dict[str, nn.Parameter], bases: dict[str, Tensor]) -> None:
        """`params`: both factors of the adapter; `bases`: B by the name of B R."""
        pairs = factor_pairs(params)
        self.products = {b: params[b] for b, _ in pairs}
        super().__init__(model, self.products)
        self._bases = bases
        self._rights = {a: params[a].data for _, a in pairs}
        self._names = {b: a.partition(A)[0] + R for b, a in pairs}
        self._sources = {name: b for b, name in self._names.items()}
        self.wire = {name: torch.zeros(bases[b].shape[1], bases[b].shape[1]) for name, b in self._sources.items()}

    def pull(self, name: str, gradient: Tensor, sink: Sink) -> None:
        sink(self._names[name], self._bases[name].T @ gradient)

    @contextmanager
    def perturbed(self, direction: Direction | None, epsilon: float) -> Iterator[None]:
        if direction is None:
            yield
            return
        moved: dict[str, Tensor] = {}
        self.slope(direction, epsilon, lambda name, z, _=0: moved.update({name: z.clone()}))
        kept = {b: product.data for b, product in self.products.items()}
        try:
            for name, b in self._sources.items():
                self.products[b].data = self._bases[b] @ (self.wire[name] + moved[name])
            yield
        finally:
            for b, product in self.products.items():
                product.data = kept[b]

    def both(self, direction: Direction, epsilon: float, parts: Sequence[Callable[[], Tensor]]) -> tuple[float, float]:
        return Trainable.both(self, direction, epsilon, parts)

    def move(self, name: str, delta: Tensor, start: int = 0) -> None:
        super().move(name, delta, start)
        self._follow(name)

    def rollback(self) -> None:
        super().rollback()
        self._follow(*self.wire)

    def apply(self, changes: Iterable[tuple[str, Tensor]], root: int) -> None:
        super().apply(changes, root)
        self._follow(*self.wire)

    def state(self) -> dict[str, Tensor]:
        lefts = {name.replace(R, ".lora_B"): self._bases[b] for name, b in self._sources.items()}
        rights = {a.partition(A)[0] + ".lora_A": right for a, right in self._rights.items()}
        return dict(sorted({**self.wire, **lefts, **rights}.items()))

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, value in self.state().items():
            value.copy_(tensors[name])
        self._anchor.clear()
        self._follow(*self.wire)

    def _follow(self, *names: str) -> None:
        for name in names:
            b = self._sources[name]
            torch.mm(self._bases[b], self.wire[name], out=self.products[b].data)


class LoraSb(Parametrization):
    writes_base: ClassVar[bool] = False
    gives: ClassVar[frozenset[str]] = frozenset({"adapter"})
    example: ClassVar[dict[str, Any]] = {"rank": 16}

    rank: int = Field(32, ge=1, description="r; r² numbers per weight travel; paper: 25 to 200 on larger models")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="linear layers that get B, R and A, by their names; paper: all seven of a layer"
    )

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
