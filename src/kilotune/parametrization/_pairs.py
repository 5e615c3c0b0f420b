"""Pairs: LoRA whose factors travel as they are, because what is combined is their product and not each of them.

An update holds A and B as training left them (`_values`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from kilotune.core.factors import component_axes, resized
from kilotune.core.lazy import torch
from kilotune.core.types import TensorUpdate
from kilotune.parametrization import Parametrization, Trainable
from kilotune.parametrization._direct import DirectTrainable
from kilotune.parametrization._targets import select
from kilotune.parametrization._values import as_they_are, happened
from kilotune.parametrization.peft import Peft

if TYPE_CHECKING:
    from torch import Tensor, nn


class PairsTrainable(DirectTrainable):
    """Factor pairs over a frozen base; `apply` takes pairs of the rank that the method allows."""

    def __init__(self, model: nn.Module, params: dict[str, nn.Parameter], scale: float) -> None:
        super().__init__(model, params)
        self.scale = scale
        self._axes = component_axes(params)
        self._whole: dict[str, Tensor] = {}  # the factors of the recipe's rank, while fewer components are trained

    def sources(self) -> dict[str, nn.Parameter]:
        return {name: param for name, param in self.params.items() if param.numel()}

    def narrow(self, components: dict[str, int]) -> None:
        """Until `rollback`, train the first components of each tensor only; the others are not there at all."""
        kept = {name: min(components[name], self.wire[name].shape[axis]) for name, axis in self._axes.items()}
        if all(self.wire[name].shape[axis] == kept[name] for name, axis in self._axes.items()):
            return
        self._whole = dict(self.wire)
        self.point_to({name: resized(self.wire[name], axis, kept[name]) for name, axis in self._axes.items()})

    def update(self) -> TensorUpdate:
        """The factors as they are now, or zeros where none of them moved."""
        moved = any(not torch.equal(value, self._start(name)) for name, value in self.wire.items())
        return as_they_are(self.wire, moved)

    def rollback(self) -> None:
        if self._whole:
            self.point_to(self._whole)
            self._whole = {}
        super().rollback()

    def apply(self, changes: Iterable[tuple[str, Tensor]], root: int) -> None:
        pairs = dict(changes)
        if happened(pairs):
            self._take(pairs)

    @abstractmethod
    def _take(self, pairs: dict[str, Tensor]) -> None:
        """Take over the pairs of a round."""

    def _start(self, name: str) -> Tensor:
        """Where this round began, of the rank that is trained."""
        axis = self._axes[name]
        return self._anchor[name].narrow(axis, 0, self.wire[name].shape[axis])

    def point_to(self, factors: dict[str, Tensor]) -> None:
        """Train these tensors in place of what is trained now; they may be of another shape."""
        for name, factor in factors.items():
            self.params[name].data = self.wire[name] = factor


class PairsMethod(Parametrization):
    """LoRA with one scale for all ranks, so that clients of different ranks mean the same by a product."""

    writes_base: ClassVar[bool] = False

    rank: int = Field(8, ge=1, description="r, the largest rank of a client; groups of clients may have a lower one")
    scale: float = Field(2.0, gt=0, description="s of s · B A, the same for every rank; LoRA's alpha / r = 16 / 8")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="linear layers that get a pair, by their names"
    )
    ranks: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="components by names of layers or parts of them, the rest is not trained; none: all have `rank`",
    )

    @field_validator("ranks")
    @classmethod
    def _at_most_rank(cls, ranks: dict[str, int], info: ValidationInfo) -> dict[str, int]:
        most = info.data.get("rank", 0)
        if any(found > most for found in ranks.values()):
            raise ValueError(f"ranks of at most parametrization.rank = {most}")
        return ranks

    def narrow(self, trainable: Trainable) -> None:
        assert isinstance(trainable, PairsTrainable)
        trainable.narrow(self.components(list(trainable.wire)))

    def components(self, names: list[str]) -> dict[str, int]:
        """How many components of each tensor are trained. Raises RecipeError for a name that fits none."""
        if not self.ranks:
            return dict.fromkeys(names, self.rank)
        found = dict.fromkeys(names, 0)
        for pattern, rank in self.ranks.items():
            found |= {name: max(rank, found[name]) for name in select(names, (pattern,), "clients.ranks")}
        return found

    def _wrapped(self, model: nn.Module, seed: int) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        return adapted(model, seed, self.rank, self.scale, self.targets)


def adapted(
    model: nn.Module, seed: int, rank: int, scale: float, targets: Literal["all-linear"] | tuple[str, ...]
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A model with plain LoRA pairs of peft, and their parameters."""
    modules = targets if isinstance(targets, str) else list(targets)
    config = {"r": rank, "lora_alpha": scale * rank, "target_modules": modules}
    return Peft(method="lora", config=config).wrapped(model, seed)
