"""Pruning: a client's model without some of its attention heads and feed-forward channels, as a smaller computation.

A *unit* is a channel of a gated feed-forward (a row of gate and up, a column of down) or a group of heads that share
their keys and values (rows of q, k and v, columns of o). While units are left out, the layers hold the others alone,
and so do the LoRA factors on them: nothing is masked, every product is smaller.

What a unit is worth is |(B A) ⊙ W| summed over its weights: B A began at zero and has moved against the gradient.
Before a client has trained it is W ⊙ W.

Source: Yao et al., "Efficient Deployment of Large Language Models on Resource-constrained Devices" (FedSpine), arXiv
2501.02438 (structured pruning between rounds of LoRA); importance from the gradients of LoRA: Zhang et al., "LoRAPrune:
Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning", arXiv 2305.18403, sec. 3.
Departs: the same share in every layer, rounded down; importance of one round, not a moving average.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import floor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kilotune.core.errors import ModelError
from kilotune.core.factors import A, B
from kilotune.core.types import State
from kilotune.parametrization._pairs import PairsTrainable

Kept = dict[str, Tensor]
"""Block -> (units,) int64, the units that it has, rising."""
FROZEN, TRAINED = 2, 3
"""Products with a matrix in one step: with the input and with the gradient; of what is trained, one more."""


class Side(NamedTuple):
    """A linear layer on one side of a block's units: `width` rows (axis 0) or columns (axis 1) belong to each."""

    path: str
    layer: Any
    axis: int
    width: int

    @property
    def linear(self) -> nn.Linear:
        """The layer without its adapter."""
        found: nn.Linear = getattr(self.layer, "base_layer", self.layer)
        return found

    def numbers(self, kept: Tensor) -> Tensor:
        """Rows or columns of these units."""
        return (kept[:, None] * self.width + torch.arange(self.width)).reshape(-1)


@dataclass(frozen=True)
class Block:
    """The units between some linear layers."""

    name: str
    units: int
    sides: tuple[Side, ...]

    def work(self, kept: int, rank: int) -> int:
        """Multiply-adds per token of a training step with so many units."""
        total = 0
        for side in self.sides:
            inner, outer = side.width * kept, side.linear.weight.shape[1 - side.axis]
            total += FROZEN * inner * outer
            total += TRAINED * rank * (inner + outer) if hasattr(side.layer, "lora_A") else 0
        return total


def blocks_of(model: nn.Module) -> list[Block]:
    """Every feed-forward and attention of a Llama-like model. Raises ModelError when there is none."""
    found = []
    for path, module in model.named_modules():
        if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
            found.append(_block(path, module, {"gate_proj": 1, "up_proj": 1}, {"down_proj": 1}))
        elif all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim")):
            size, many = module.head_dim, _rows(module.q_proj) // _rows(module.k_proj)
            assert isinstance(size, int)
            writing, reading = {"k_proj": size, "v_proj": size, "q_proj": many * size}, {"o_proj": many * size}
            found.append(_block(path, module, writing, reading))
    if not found:
        raise ModelError("arms.pruning: this base has no gated feed-forward and no attention like Llama's. Use [0.0].")
    return found


def _rows(layer: Any) -> int:
    return int(getattr(layer, "base_layer", layer).weight.shape[0])


def _block(path: str, module: nn.Module, writing: dict[str, int], reading: dict[str, int]) -> Block:
    sides = [
        Side(f"{path}.{name}", getattr(module, name), axis, width)
        for axis, named in enumerate((writing, reading))
        for name, width in named.items()
    ]
    first = sides[0]
    return Block(path, first.linear.weight.shape[0] // first.width, tuple(sides))


def work(model: Any, blocks: list[Block], pruning: float, rank: int) -> int:
    """Multiply-adds per token of a step of a client that has left out so much: of the layers, and of the head."""
    head = model.get_output_embeddings().weight.numel()
    return FROZEN * head + sum(block.work(left(block.units, pruning), rank) for block in blocks)


def left(units: int, pruning: float) -> int:
    """Units that stay when up to this share of them goes; one stays in any case."""
    return max(1, units - floor(pruning * units + 1e-9))


# -- which units stay -------------------------------------------------------------------------------------------------


def kept_before(blocks: list[Block], remembered: State) -> Kept:
    """The units that a client has had until now."""
    return {block.name: remembered.get(f"kept/{block.name}", torch.arange(block.units)) for block in blocks}


def most_important(blocks: list[Block], before: Kept, remembered: State, pruning: float) -> Kept:
    """Up to this share of all units goes, those of least worth first; what has gone does not come back."""
    kept = {}
    for block in blocks:
        had, number = before[block.name], left(block.units, pruning)
        kept[block.name] = had
        if number < len(had):
            known = remembered.get(f"score/{block.name}")
            scores = weight_scores(block) if known is None else known
            order = torch.argsort(scores[had], descending=True, stable=True)
            kept[block.name] = had[order[:number]].sort().values
    return kept


def weight_scores(block: Block) -> Tensor:
    """(units,) float32: the squares of every unit's weights, summed."""
    return _summed(block, {side.path: side.linear.weight.data.square() for side in block.sides}, block.units)


def gradient_scores(block: Block, params: Mapping[str, nn.Parameter], kept: Tensor, remembered: State) -> None:
    """Remember what this round's LoRA says of the units that were trained; those that are gone have nothing."""
    products = {}
    for side in block.sides:
        names = [name for name in params if name.startswith(side.path + A)]
        for a in names:
            moved = params[a.replace(A, B)].data @ params[a].data
            products[side.path] = moved.mul_(side.linear.weight.data).abs_()
    if products:
        scores = torch.zeros(block.units)
        scores[kept] = _summed(block, products, len(kept))
        remembered[f"score/{block.name}"] = scores


def _summed(block: Block, tables: Mapping[str, Tensor], units: int) -> Tensor:
    total = torch.zeros(units)
    for side in block.sides:
        if side.path in tables:
            table = tables[side.path].movedim(side.axis, 0).contiguous()
            total += table.reshape(units, -1).sum(1)
    return total


# -- a model of the kept units ----------------------------------------------------------------------------------------


@contextmanager
def only(trainable: PairsTrainable, blocks: list[Block], kept: Kept) -> Iterator[None]:
    """Inside, the layers are of these units alone. What was trained of their factors is in place afterwards, and zero
    where units were left out."""
    whole: list[tuple[nn.Parameter, Tensor]] = []
    factors: dict[str, tuple[Tensor, int, Tensor]] = {}
    for block in blocks:
        if len(kept[block.name]) == block.units:
            continue
        for side in block.sides:
            index = side.numbers(kept[block.name])
            whole += [(param, param.data) for param in _parameters(side)]
            name = next((n for n in trainable.wire if n.startswith(side.path + (A if side.axis else B))), None)
            if name is not None:
                factors[name] = trainable.wire[name], side.axis, index
            for param in _parameters(side):
                param.data = param.data.index_select(side.axis if param.dim() > 1 else 0, index)
    trainable.point_to({name: full.index_select(axis, index) for name, (full, axis, index) in factors.items()})
    try:
        yield
    finally:
        for param, data in whole:
            param.data = data
        for name, (full, axis, index) in factors.items():
            full.zero_().index_copy_(axis, index, trainable.wire[name])
        trainable.point_to({name: full for name, (full, _, _) in factors.items()})


def _parameters(side: Side) -> list[nn.Parameter]:
    """What a layer holds of its units: its weight, and its bias if that is theirs."""
    return [param for name, param in side.linear.named_parameters() if name == "weight" or side.axis == 0]
