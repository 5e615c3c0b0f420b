"""Batches: which examples make up step t, a function of (number, seed, t) and nothing else; their layout in memory."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from torch import nn

from kilotune.core.rng import stream
from kilotune.core.types import Batch
from kilotune.engine.packing import can_pack, lay_out
from kilotune.engine.recipe import Recipe
from kilotune.engine.tokenize import Example

__all__ = ["BatchSampler", "micro_batches"]


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
