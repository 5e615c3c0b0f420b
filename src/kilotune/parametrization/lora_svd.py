"""LoRA-SVD: w + s · P diag(e) Q, P (out, r) and Q (r, in) with orthonormal columns and rows, e = 0 at the start.

Every round starts with new P and Q and e = 0, and ends with w ← w + s · P diag(e) Q. All three are trained; what is
sent is the pair B = P diag(e), A = Q, whose component k is singular direction k; one left out changes nothing.

Source: "AirLLM: Diffusion Policy-based Adaptive LoRA for Remote Fine-Tuning of LLM over the Air" and the authors' code
    (ZJUNICE/AirLLM); the form is that of Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient
    Fine-Tuning", arXiv 2303.10512, sec. 3.1.
Departs: rounds of several clients, each merged, instead of one client's adapter: products can be added up exactly, P, e
    and Q one by one cannot. P and Q follow from the round's root. No penalty holds them orthonormal: a round is short,
    and the next one starts anew. e travels inside B, so a direction is one number fewer than in AirLLM.
Memory: P beside the pair, and what `lora_merged` takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from kilotune.core.errors import RecipeError
from kilotune.core.factors import A, factor_pairs
from kilotune.core.lazy import torch
from kilotune.core.linalg import one_thread
from kilotune.core.rng import stream
from kilotune.core.types import TensorUpdate
from kilotune.parametrization import Directions, Sink, Trainable
from kilotune.parametrization._derived import DerivedTrainable
from kilotune.parametrization._pairs import PairsMethod
from kilotune.parametrization._values import as_they_are
from kilotune.parametrization.lora_merged import LoraMergedTrainable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

P, E = ".lora_P", ".lora_E"


class LoraSvdTrainable(DerivedTrainable, LoraMergedTrainable):
    """A LoRA adapter with the factors A = Q and B = P diag(e): gradients of B become those of P and e, B follows."""

    def __init__(self, model: nn.Module, params: dict[str, nn.Parameter], scale: float) -> None:
        super().__init__(model, params, scale)
        self._shapes = {name: tuple(param.shape) for name, param in params.items()}
        self._names = {b: (a.partition(A)[0] + P, a.partition(A)[0] + E) for b, a in self._pairs}
        self.wire, self._axes, self._owners = {}, {}, dict[str, tuple[str, str]]()
        for b, a in self._pairs:
            p, e = self._names[b]
            self.wire |= {p: torch.zeros_like(params[b]), e: torch.zeros(params[b].shape[1]), a: params[a].data}
            self._axes |= {p: 1, e: 0, a: 0}
            self._owners |= dict.fromkeys((p, e, a), (b, a))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def pull(self, name: str, gradient: Tensor, sink: Sink) -> None:
        if name not in self._names:
            sink(name, gradient)
            return
        p, e = self._names[name]
        with one_thread():
            of_p, of_e = gradient * self.wire[e], (gradient * self.wire[p]).sum(0)
        sink(p, of_p)
        sink(e, of_e)

    def update(self) -> TensorUpdate:
        """B and A as they are now, or zeros where e did not move."""
        moved = any(self.wire[e].any() for _, e in self._names.values())
        return as_they_are({name: param.data for name, param in self.params.items()}, moved)

    def _fresh(self, root: int) -> None:
        with one_thread():
            for b, a in self._pairs:
                p, _ = self._names[b]
                self.wire[p].copy_(_orthonormal(stream(root, "lora_P", b), *self.wire[p].shape))
                self.wire[a].copy_(_orthonormal(stream(root, "lora_Q", a), *self.wire[a].T.shape).T)
        self._empty()

    def _empty(self) -> None:
        for _, e in self._names.values():
            self.wire[e].zero_()
        self.follow(self.wire)

    def point_to(self, factors: dict[str, Tensor]) -> None:
        self.wire.update(factors)
        self.follow(self.wire)

    def follow(self, wire: dict[str, Tensor], *names: str) -> None:
        for b, a in {self._owners[name] for name in names} or self._pairs:
            p, e = self._names[b]
            self.params[b].data, self.params[a].data = wire[p] * wire[e], wire[a]


def _orthonormal(rng: np.random.Generator, rows: int, columns: int) -> Tensor:
    """(rows, columns) float64 with orthonormal columns."""
    return torch.linalg.qr(torch.from_numpy(rng.standard_normal((rows, columns)))).Q


class LoraSvd(PairsMethod):
    gives: ClassVar[frozenset[str]] = frozenset({"values", "factor_pair", "fresh_start", "directions"})
    example: ClassVar[dict[str, Any]] = {"scale": 8.0}

    scale: float = Field(0.5, gt=0, description="s of s · P diag(e) Q, the same for every rank; AirLLM: 32 / 64")

    def attach(self, model: nn.Module, *, basis: Directions | None, seed: int) -> Trainable:
        wrapped, params = self._wrapped(model, seed)
        for b, a in factor_pairs(params):
            most = min(params[b].shape[0], params[a].shape[1])
            if self.rank > most:
                raise RecipeError(
                    f"parametrization.rank: got {self.rank}, expected at most {most}, the smaller side of "
                    f"{a.partition(A)[0].split('.', 2)[-1]}. Use a lower rank, or other targets."
                )
        return LoraSvdTrainable(wrapped, params, self.scale)


METHOD = LoraSvd
