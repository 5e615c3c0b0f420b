"""The values that travel between parts: batches, updates, examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

State: TypeAlias = "dict[str, Tensor]"
"""What a method remembers between calls. The engine owns it, passes it in and saves it."""


@dataclass(frozen=True)
class Batch:
    """A batch; labels are already aligned with input_ids (-100 where no loss).

    A row holds one example, or, when `positions` and `visible` are there, several laid end to end.
    """

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 0 on padding
    rows: Tensor | None = None  # (B, T) int64, the example each token belongs to, -1 on padding; none: the batch row
    positions: Tensor | None = None  # (B, T) int64, of each token in its example
    visible: Tensor | None = None  # (B, 1, T, T) bool, [b, 0, q, k]: token q attends to token k

    @property
    def num_labels(self) -> int:
        """Tokens that carry loss (the first position of a row never does)."""
        return int((self.labels[:, 1:] != -100).sum())

    @property
    def num_examples(self) -> int:
        """Examples it holds."""
        return len(self.input_ids) if self.rows is None else int((self.rows.unique() >= 0).sum())


@dataclass(frozen=True)
class TensorUpdate:
    """A change (after - before) of named float32 tensors: weights, adapters or coordinates of a basis."""

    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class SeedUpdate:
    """A change written as n (direction, coefficient) pairs of a public basis; directions may repeat.

    `groups` is None, or names for each pair the group of tensors it acts on (Ferret). `senders` is None, or names for
    each pair who probed it (peers that hear of each other's steps one by one).
    """

    indices: np.ndarray  # (n,) int64
    coefs: np.ndarray  # (n,) float32, the amount by which the weights move along the direction
    groups: np.ndarray | None = None  # (n,) int64
    senders: np.ndarray | None = None  # (n,) int64


Update = TensorUpdate | SeedUpdate


@dataclass(frozen=True)
class WireContext:
    """What both ends of the wire know without sending it.

    `root` seeds the round's public noise; `shapes` lists the trainable tensors in model order;
    `size` is the number of directions of the basis (0 when there is none); `rng` is the sender's
    private generator (absent when decoding). `sender` is a number for whose update it is; `probes` gives for such a
    number the directions, (steps,) int64, of all steps it may take in the round.
    """

    round: int
    root: int
    shapes: dict[str, tuple[int, ...]]
    size: int = 0
    rng: np.random.Generator | None = field(default=None, compare=False)
    sender: int = 0
    probes: Callable[[int], np.ndarray] | None = field(default=None, compare=False)
