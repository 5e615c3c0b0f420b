"""Dual LoRA: w + s · (B A + B' A'); all clients train B A together, B' A' belongs to one client and never leaves it.

The model that everybody has is w + s · B A. While a client trains, its own pair lies beside the shared one as further
components of one adapter, so both see the same steps.

Source: Yang, Long, Shen, Jiang and Blumenstein, "Dual-Personalizing Adapter for Federated Foundation Models" (FedDPA),
    arXiv 2403.19211; each pair: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
Departs: one step trains both, where FedDPA-T trains the shared pair alone and then the personal one beside it, held
    fixed and each weighing one half: that costs twice the steps. Both weigh 1 for every row; the weight that the paper
    chooses for each row at inference, from rows that are kept for comparison, is not there.
Memory: the client's own pair, as many numbers again as the shared one at equal ranks; on disk between rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from kilotune.core.factors import A, component_axes
from kilotune.core.lazy import torch
from kilotune.core.rng import stream
from kilotune.core.types import State, TensorUpdate
from kilotune.parametrization import Direction, Directions, Parametrization, Sink, Trainable
from kilotune.parametrization._direct import DirectTrainable
from kilotune.parametrization._pairs import adapted
from kilotune.parametrization.peft import ADAPTER

if TYPE_CHECKING:
    from torch import Tensor, nn


class DualTrainable(DirectTrainable):
    """Wire tensors are the shared factors and, from `take_up` to `rollback`, the client's own ones."""

    def __init__(self, model: Any, params: dict[str, nn.Parameter], method: DualLora, seed: int) -> None:
        super().__init__(model, params)
        self._method, self._seed, self._config = method, seed, model.peft_config[ADAPTER]
        self._axes = component_axes(params)
        self._shared = self.wire
        self._names = {name: name.replace(f".{ADAPTER}.", ".personal.") for name in params}  # of the own factors
        self._places: dict[str, Tensor] = {}  # where each factor lies in the adapter's; empty without own factors

    def take_up(self, kept: State) -> None:
        ranks = [self._method.rank, self._method.personal_rank]
        for name, mine in self._names.items():
            own = kept[mine].clone() if kept else self._start(name, ranks[1])
            self.wire = {**self.wire, mine: own}
            self.params[name].data = torch.cat([self._shared[name], own], self._axes[name])
            self._places |= zip((name, mine), self.params[name].data.split(ranks, self._axes[name]), strict=True)
        self._tell_rank(sum(ranks))

    def own(self) -> State:
        return {name: value.clone() for name, value in self.wire.items() if name not in self._shared}

    def pull(self, name: str, gradient: Tensor, sink: Sink) -> None:
        if not self._places:
            sink(name, gradient)
            return
        ranks = [self._method.rank, self._method.personal_rank]
        for part, values in zip((name, self._names[name]), gradient.split(ranks, self._axes[name]), strict=True):
            sink(part, values.contiguous())

    @contextmanager
    def perturbed(self, direction: Direction | None, epsilon: float) -> Iterator[None]:
        if direction is None or not self._places:
            with super().perturbed(direction, epsilon):
                yield
            return
        try:
            for name, moved in self.probe(direction, epsilon).items():
                self._places[name].add_(moved)
            yield
        finally:
            for name, place in self._places.items():
                place.copy_(self.wire[name])

    def both(self, direction: Direction, epsilon: float, parts: Sequence[Callable[[], Tensor]]) -> tuple[float, float]:
        if not self._places:
            return super().both(direction, epsilon, parts)
        return Trainable.both(self, direction, epsilon, parts)

    def move(self, name: str, delta: Tensor, start: int = 0) -> None:
        super().move(name, delta, start)
        if self._places:
            self._places[name].copy_(self.wire[name])

    def update(self) -> TensorUpdate:
        return TensorUpdate({name: value - self._anchor[name] for name, value in self._shared.items()})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self._shared.items()}

    def rollback(self) -> None:
        self.wire, self._places = self._shared, {}
        for name, value in self._shared.items():
            self.params[name].data = value
        self._tell_rank(self._method.rank)
        super().rollback()

    def _start(self, name: str, rank: int) -> Tensor:
        """As LoRA starts: A random, B = 0."""
        shape = list(self._shared[name].shape)
        shape[self._axes[name]] = rank
        if A not in name:
            return torch.zeros(shape)
        bound = shape[1] ** -0.5
        return torch.from_numpy(stream(self._seed, "personal", name).uniform(-bound, bound, shape)).float()

    def _tell_rank(self, rank: int) -> None:
        """What an exported adapter says of itself; peft's scale is alpha / r."""
        self._config.r, self._config.lora_alpha = rank, self._method.scale * rank


class DualLora(Parametrization):
    writes_base: ClassVar[bool] = False
    gives: ClassVar[frozenset[str]] = frozenset({"adapter", "personal"})

    rank: int = Field(8, ge=1, description="rank of the shared pairs; FedDPA: 8")
    personal_rank: int = Field(8, ge=1, description="rank of a client's own pairs; FedDPA: 8")
    scale: float = Field(2.0, gt=0, description="s; LoRA's alpha / r = 16 / 8, as in FedDPA's code")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="linear layers that get both pairs, by their names; FedDPA: q_proj and v_proj"
    )

    def attach(self, model: nn.Module, *, basis: Directions | None, seed: int) -> Trainable:
        return DualTrainable(*adapted(model, seed, self.rank, self.scale, self.targets), self, seed)


METHOD = DualLora
