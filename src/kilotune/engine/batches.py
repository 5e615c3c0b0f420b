"""Batches: which examples make up step t, and padding. Batch t is a function of (number, seed, t) and nothing else."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from kilotune.core.rng import stream
from kilotune.core.types import Batch
from kilotune.engine.recipe import Recipe
from kilotune.engine.tokenize import IGNORE, Example

__all__ = ["BatchSampler", "collate", "evaluation_batches", "micro_batches"]


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


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Right-padded to the longest; padding has mask 0 and no label. Which pad_id is used changes no loss."""
    shape = (len(examples), max(len(example.input_ids) for example in examples))
    input_ids = np.full(shape, pad_id, dtype=np.int64)  # (B, T)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = example.input_ids
        labels[row, :length] = example.labels
        mask[row, :length] = 1
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(labels), torch.from_numpy(mask))


def micro_batches(rows: Sequence[Example], recipe: Recipe, pad_id: int) -> list[Batch]:
    """The rows of one step, cut into the recipe's micro-batches; rows of like length together, to pad little."""
    size = recipe.micro_batch_size or len(rows)
    rows = sorted(rows, key=lambda example: len(example.input_ids))
    return [collate(rows[i : i + size], pad_id) for i in range(0, len(rows), size)]


def evaluation_batches(examples: Sequence[Example], max_tokens: int) -> list[list[int]]:
    """Indices grouped by length, longest first, each group at most max_tokens with its padding (or one example)."""
    lengths = [len(example.input_ids) for example in examples]
    groups: list[list[int]] = []
    for index in sorted(range(len(examples)), key=lambda i: (-lengths[i], i)):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
