"""Packing: which rows of a batch are laid end to end, without padding and what they have in common only once.

Rows that begin alike (the system turn, an instruction all rows of a client share) walk the same path through a tree of
tokens: a row adds only the tokens after the point where it leaves an earlier one. A token attends to its own path and
nothing else, at the positions it would have alone, so every labelled token has the loss and the gradient it has in a
batch of padded rows, up to rounding, at the cost of the distinct tokens.

Source: the tree attention of Miao et al., "SpecInfer: Accelerating Generative Large Language Model Serving with
    Tree-based Speculative Inference and Verification", arXiv 2305.09781, sec. 4.2, here for training.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kilotune.engine.rows.tokenize import IGNORE, Example

__all__ = ["Pack", "alone", "cut", "sees_whole_rows"]

# Attention over a pack is quadratic in its length. Cost of a pack of n tokens in units of one token's matrix products:
# n + n²/PAIRS; for a Llama layer of width h that is about 3h (h = 576 here, wider models gain from longer packs).
PAIRS = 1700
# A pack of its own costs a little more than its tokens: small matrices, and padding to its neighbours in the batch.
LONELY = 1.15


@dataclass
class Pack:
    """Rows (indices of examples) in the order they are laid; row j shares its first `shared[j]` tokens with row j-1."""

    rows: list[int] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)
    length: int = 0

    def add(self, row: int, shared: int, length: int) -> None:
        self.rows.append(row)
        self.shared.append(shared)
        self.length += length - shared

    def strides(self, examples: Sequence[Example]) -> Iterator[tuple[slice, int, int]]:
        """Where each row's own tokens lie: (places, row, tokens it shares)."""
        used = 0
        for row, shared in zip(self.rows, self.shared, strict=True):
            end = used + len(examples[row].input_ids) - shared
            yield slice(used, end), row, shared
            used = end


def cut(examples: Sequence[Example], max_tokens: int, packed: bool) -> list[list[Pack]]:
    """Batches of at most `max_tokens` tokens, padding included (or one pack that is longer), longest packs first.

    Not packed: every row is a pack of its own, like lengths together.
    """
    packs = _packs(examples, max_tokens) if packed else [alone(examples, row) for row in range(len(examples))]
    packs.sort(key=lambda pack: (-pack.length, pack.rows[0]))
    groups: list[list[Pack]] = []
    for pack in packs:
        if groups and groups[-1][0].length * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(pack)
        else:
            groups.append([pack])
    return groups


def alone(examples: Sequence[Example], row: int) -> Pack:
    """A pack of one row."""
    return Pack([row], [0], len(examples[row].input_ids))


def _packs(examples: Sequence[Example], max_tokens: int) -> list[Pack]:
    """Rows in lexicographic order, so that neighbours share most; each joins the open pack if that is cheaper."""
    packs: list[Pack] = []
    previous: Example | None = None
    for row in sorted(range(len(examples)), key=lambda i: examples[i].input_ids.tolist()):
        example = examples[row]
        length = len(example.input_ids)
        shared = 0 if previous is None else _common(previous, example)
        if not packs or not _joins(packs[-1].length, length - shared, length, max_tokens):
            packs.append(Pack())
            shared = 0
        packs[-1].add(row, shared, length)
        previous = example
    return packs


def _joins(packed: int, new: int, alone: int, max_tokens: int) -> bool:
    """Whether a row joins a pack to which it adds `new` tokens, instead of being `alone` tokens by itself."""
    return packed + new <= max_tokens and _cost(packed + new) - _cost(packed) <= LONELY * _cost(alone)


def _cost(length: int) -> float:
    return length + length * length / PAIRS


def _common(a: Example, b: Example) -> int:
    """Tokens that b may take over from a: their common start, short of the token that predicts b's first label."""
    length = min(len(a.input_ids), len(b.input_ids))
    differ = np.flatnonzero(a.input_ids[:length] != b.input_ids[:length])
    labelled = np.flatnonzero(b.labels[1:] != IGNORE)  # position t predicts token t + 1
    first = int(labelled[0]) if len(labelled) else len(b.input_ids) - 1
    return min(int(differ[0]) if len(differ) else length, first)


def sees_whole_rows(setting: Callable[[str, Any], Any]) -> bool:
    """Whether every layer of a model attends to all of a row; `setting(key, default)` looks into its config."""
    windowed = setting("sliding_window", None) and setting("use_sliding_window", True)
    return not windowed and all(kind == "full_attention" for kind in setting("layer_types", None) or ())
