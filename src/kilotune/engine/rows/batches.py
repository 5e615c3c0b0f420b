"""Batches: which examples make up step t, a function of (number, seed, t) and nothing else; their layout in memory."""

from collections.abc import Sequence
from functools import lru_cache, partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from kilotune.core.choosing import chooser
from kilotune.core.rng import stream
from kilotune.core.types import Batch
from kilotune.engine.composing.recipe import Recipe
from kilotune.engine.model.loss import label_losses, splits
from kilotune.engine.rows.packing import Pack, alone, cut, sees_whole_rows
from kilotune.engine.rows.tokenize import IGNORE, Example

__all__ = ["BatchSampler", "can_pack", "collate", "lay_out", "micro_batches"]


@lru_cache(maxsize=64)
def _order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    return stream(seed, "epoch", epoch).permutation(num_examples)


class BatchSampler:
    """Endless shuffled epochs that can be entered at any step.

    The permutations of the epochs form one endless sequence, cut into batches: every example comes once per epoch,
    and a batch may hold the end of one epoch and the start of the next. A batch size above the number of examples
    is cut down to it: one step never passes over the data more than once.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int) -> None:
        if num_examples < 1 or batch_size < 1:
            raise ValueError(f"BatchSampler: got {num_examples} examples, batch size {batch_size}, expected both >= 1.")
        self.num_examples = num_examples
        self.batch_size = min(batch_size, num_examples)
        self.seed = seed

    def indices(self, step: int) -> list[int]:
        """The examples of step `step`, counted from 0."""
        first = step * self.batch_size
        chosen: list[int] = []
        for epoch in range(first // self.num_examples, (first + self.batch_size - 1) // self.num_examples + 1):
            order = _order(self.num_examples, self.seed, epoch)
            start = epoch * self.num_examples
            chosen += order[max(0, first - start) : first + self.batch_size - start].tolist()
        return chosen


def micro_batches(rows: Sequence[Example], recipe: Recipe, model: nn.Module, pad_id: int) -> list[Batch]:
    """The rows of one step in batches of the recipe's `micro_batch_tokens`, packed where the model can."""
    return lay_out(rows, recipe.micro_batch_tokens, pad_id, can_pack(model))


def lay_out(examples: Sequence[Example], max_tokens: int, pad_id: int, packed: bool) -> list[Batch]:
    """Batches of at most `max_tokens` tokens (`packing.cut`). `Batch.rows` are indices into `examples`."""
    return [_collate(group, examples, pad_id) for group in cut(examples, max_tokens, packed)]


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """One batch, a row per example, right-padded to the longest. Which pad_id is used changes no loss."""
    return _collate([alone(examples, row) for row in range(len(examples))], examples, pad_id)


def _collate(packs: Sequence[Pack], examples: Sequence[Example], pad_id: int) -> Batch:
    size, width = len(packs), max(pack.length for pack in packs)
    input_ids = np.full((size, width), pad_id, dtype=np.int64)
    labels = np.full((size, width), IGNORE, dtype=np.int64)
    mask = np.zeros((size, width), dtype=np.int64)
    rows = np.full((size, width), -1, dtype=np.int64)
    for b, pack in enumerate(packs):
        mask[b, : pack.length] = 1
        for new, row, shared in pack.strides(examples):
            input_ids[b, new] = examples[row].input_ids[shared:]
            labels[b, new] = examples[row].labels[shared:]
            labels[b, new.start] = IGNORE  # the token before it belongs to another row
            rows[b, new] = row
    plain = (torch.from_numpy(input_ids), torch.from_numpy(labels), torch.from_numpy(mask), torch.from_numpy(rows))
    if all(len(pack.rows) == 1 for pack in packs):
        return Batch(*plain)
    return Batch(*plain, *_tree(packs, examples, width))


def _tree(packs: Sequence[Pack], examples: Sequence[Example], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """positions (B, T): of each token in its row; visible (B, 1, T, T): the tokens of its path up to itself."""
    positions = np.zeros((len(packs), width), dtype=np.int64)
    visible = np.zeros((len(packs), 1, width, width), dtype=bool)
    visible[:, 0, np.arange(width), np.arange(width)] = True  # padding sees itself: a row of nothing has no softmax
    for b, pack in enumerate(packs):
        path = np.zeros(0, dtype=np.int64)
        for new, row, shared in pack.strides(examples):
            path = np.concatenate([path[:shared], np.arange(new.start, new.stop)])
            depth = np.arange(shared, len(examples[row].input_ids))
            positions[b, new] = depth
            visible[b, 0, new.start : new.stop, path] = (np.arange(len(path))[None] <= depth[:, None]).T
    return torch.from_numpy(positions), torch.from_numpy(visible)


# -- which models can be given packed rows ---------------------------------------------------------------------------

_CAN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def can_pack(model: nn.Module) -> bool:
    """Whether the model gives packed rows the losses they have alone; tried once, on three short rows.

    State-space layers, learned position tables within the attention mask, virtual tokens in front of a row and the
    like show in the comparison. Sliding windows would not on short rows, so those models are never packed, and neither
    are those that choose for every row how to compute it.
    """
    if chooser(model) is not None:
        return False
    if model not in _CAN:
        setting = partial(getattr, getattr(model, "config", None))
        _CAN[model] = splits(model) and sees_whole_rows(setting) and _same_losses(model)
    return _CAN[model]


def _same_losses(model: nn.Module) -> bool:
    examples = [_example([1, 2, 3, 4, 5, 6]), _example([1, 2, 3, 5, 7]), _example([4, 2, 1])]
    try:
        alone = label_losses(model, collate(examples, 0))
        (pack,) = lay_out(examples, 64, 0, packed=True)
        packed = label_losses(model, pack)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False
    order = torch.argsort(packed.rows, stable=True)
    return bool(torch.allclose(packed.losses[order], alone.losses, rtol=1e-3, atol=1e-4))


def _example(tokens: list[int]) -> Example:
    ids = np.array(tokens, dtype=np.int32)
    labels = np.where(np.arange(len(ids)) >= len(ids) - 1, ids, IGNORE)
    return Example(ids, labels, len(ids) - 1, "", None, 0)
