"""Packing: rows of a batch laid end to end without padding, what they have in common only once.

Rows that begin alike (the system turn, an instruction all rows of a client share) walk the same path through a tree of
tokens: a row adds only the tokens after the point where it leaves an earlier one. A token attends to its own path and
nothing else, at the positions it would have alone, so every labelled token has the loss and the gradient it has in a
batch of padded rows, up to rounding, at the cost of the distinct tokens.

Source: the tree attention of Miao et al., "SpecInfer: Accelerating Generative Large Language Model Serving with
    Tree-based Speculative Inference and Verification", arXiv 2305.09781, sec. 4.2, here for training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from kilotune.core.types import Batch
from kilotune.engine.loss import label_losses, splits
from kilotune.engine.tokenize import IGNORE, Example

__all__ = ["can_pack", "collate", "lay_out"]

# Attention over a pack is quadratic in its length. Cost of a pack of n tokens in units of one token's matrix products:
# n + n²/PAIRS; for a Llama layer of width h that is about 3h (h = 576 here, wider models gain from longer packs).
PAIRS = 1700
# A pack of its own costs a little more than its tokens: small matrices, and padding to its neighbours in the batch.
LONELY = 1.15


@dataclass
class _Pack:
    """Rows (indices of examples) in the order they are laid; row j shares its first `shared[j]` tokens with row j-1."""

    rows: list[int] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)
    length: int = 0

    def add(self, row: int, shared: int, length: int) -> None:
        self.rows.append(row)
        self.shared.append(shared)
        self.length += length - shared


def lay_out(examples: Sequence[Example], max_tokens: int, pad_id: int, packed: bool) -> list[Batch]:
    """Batches of at most `max_tokens` tokens, padding included (or one pack that is longer), longest packs first.

    `Batch.rows` are indices into `examples`. Not packed: every row is a row of its batch, like lengths together.
    """
    packs = _packs(examples) if packed else [_alone(examples, i) for i in range(len(examples))]
    packs.sort(key=lambda pack: (-pack.length, pack.rows[0]))
    groups: list[list[_Pack]] = []
    for pack in packs:
        if groups and groups[-1][0].length * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(pack)
        else:
            groups.append([pack])
    return [_collate(group, examples, pad_id) for group in groups]


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """One batch, a row per example, right-padded to the longest. Which pad_id is used changes no loss."""
    return _collate([_alone(examples, i) for i in range(len(examples))], examples, pad_id)


def _alone(examples: Sequence[Example], row: int) -> _Pack:
    return _Pack([row], [0], len(examples[row].input_ids))


def _packs(examples: Sequence[Example]) -> list[_Pack]:
    """Rows in lexicographic order, so that neighbours share most; each joins the open pack when that is cheaper."""
    packs: list[_Pack] = []
    previous: Example | None = None
    for row in sorted(range(len(examples)), key=lambda i: examples[i].input_ids.tolist()):
        example = examples[row]
        length = len(example.input_ids)
        shared = 0 if previous is None else _common(previous, example)
        if not packs or _cost(packs[-1].length + length - shared) - _cost(packs[-1].length) > LONELY * _cost(length):
            packs.append(_Pack())
            shared = 0
        packs[-1].add(row, shared, length)
        previous = example
    return packs


def _cost(length: int) -> float:
    return length + length * length / PAIRS


def _common(a: Example, b: Example) -> int:
    """Tokens that b may take over from a: their common start, short of the token that predicts b's first label."""
    length = min(len(a.input_ids), len(b.input_ids))
    differ = np.flatnonzero(a.input_ids[:length] != b.input_ids[:length])
    labelled = np.flatnonzero(b.labels[1:] != IGNORE)  # position t predicts token t + 1
    first = int(labelled[0]) if len(labelled) else len(b.input_ids) - 1
    return min(int(differ[0]) if len(differ) else length, first)


def _collate(packs: Sequence[_Pack], examples: Sequence[Example], pad_id: int) -> Batch:
    size, width = len(packs), max(pack.length for pack in packs)
    input_ids = np.full((size, width), pad_id, dtype=np.int64)
    labels = np.full((size, width), IGNORE, dtype=np.int64)
    mask = np.zeros((size, width), dtype=np.int64)
    rows = np.full((size, width), -1, dtype=np.int64)
    for b, pack in enumerate(packs):
        mask[b, : pack.length] = 1
        for new, row, shared in _strides(pack, examples):
            input_ids[b, new] = examples[row].input_ids[shared:]
            labels[b, new] = examples[row].labels[shared:]
            labels[b, new.start] = IGNORE  # the token before it belongs to another row
            rows[b, new] = row
    plain = tuple(map(torch.from_numpy, (input_ids, labels, mask, rows)))
    if all(len(pack.rows) == 1 for pack in packs):
        return Batch(*plain)
    return Batch(*plain, *_tree(packs, examples, width))


def _strides(pack: _Pack, examples: Sequence[Example]) -> list[tuple[slice, int, int]]:
    """Where each row's own tokens lie in the pack: (places, row, tokens it shares)."""
    strides, used = [], 0
    for row, shared in zip(pack.rows, pack.shared, strict=True):
        end = used + len(examples[row].input_ids) - shared
        strides.append((slice(used, end), row, shared))
        used = end
    return strides


def _tree(packs: Sequence[_Pack], examples: Sequence[Example], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """positions (B, T): of each token in its row; visible (B, 1, T, T): the tokens of its path up to itself."""
    positions = np.zeros((len(packs), width), dtype=np.int64)
    visible = np.zeros((len(packs), 1, width, width), dtype=bool)
    visible[:, 0, np.arange(width), np.arange(width)] = True  # padding sees itself: a row of nothing has no softmax
    for b, pack in enumerate(packs):
        path = np.zeros(0, dtype=np.int64)
        for new, row, shared in _strides(pack, examples):
            path = np.concatenate([path[:shared], np.arange(new.start, new.stop)])
            depth = np.arange(shared, len(examples[row].input_ids))
            positions[b, new] = depth
            visible[b, 0, new.start : new.stop, path] = (np.arange(len(path))[None] <= depth[:, None]).T
    return torch.from_numpy(positions), torch.from_numpy(visible)


# -- which models can ------------------------------------------------------------------------------------------------

_CAN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def can_pack(model: nn.Module) -> bool:
    """Whether the model gives packed rows the losses they have alone; tried once, on three short rows.

    State-space layers, learned position tables within the attention mask, virtual tokens in front of a row and the
    like show in the comparison. Sliding windows would not on short rows, so those models are never packed.
    """
    if model not in _CAN:
        _CAN[model] = splits(model) and not _has_window(model) and _same_losses(model)
    return _CAN[model]


def _has_window(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    layers = getattr(config, "layer_types", None) or ()
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return bool(windowed) or any(kind != "full_attention" for kind in layers)


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
