"""Prompt and tail: n vectors of width h in front of every row, LoRA pairs B A in the last blocks; the rest is frozen.

    x ← [p_1 … p_n, x],    w ← w + s · B A  for the linear layers of the last k blocks

What is trained lies before the first block and in the last ones, so that a client needs no block between them where
`split` leaves these to the server. The prompts reach the loss of a shortcut from the embedding to the tail through
the attention of the tail's blocks, which is why the tail has blocks and not an output head alone.

Source: Cao, Zhu and Gong, "SFPrompt: Communication-Efficient Split Federated Fine-Tuning for Large Pre-Trained Models
    over Resource-Limited Devices", arXiv 2407.17533; prompts: Lester, Al-Rfou and Constant, "The Power of Scale for
    Parameter-Efficient Prompt Tuning", arXiv 2104.08691; pairs: Hu et al., "LoRA: Low-Rank Adaptation of Large Language
    Models", arXiv 2106.09685.
Departs: the paper's tail is a classifier, trained whole. The head of a language model is often tied to its embedding
    and has a row per token: a change of it of rank 8 is 398,000 numbers on SmolLM2, pairs in one of its blocks 81,000.
Bits: the prompts start uniform in (-spread, spread), drawn from the run's seed. They change the output at attachment.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from kilotune.parametrization import Directions, Parametrization, Trainable
from kilotune.parametrization._direct import DirectTrainable
from kilotune.parametrization._pairs import adapted

if TYPE_CHECKING:
    from torch import nn

PROMPTS = "prompts"
BLOCK = re.compile(r"\.(\d+)\.")


class PromptTail(Parametrization):
    writes_base: ClassVar[bool] = False
    neutral: ClassVar[bool] = False
    gives: ClassVar[frozenset[str]] = frozenset({"tail"})

    prompts: int = Field(5, ge=1, description="n, vectors in front of every row; from an implementation by others: 5")
    spread: float = Field(0.1, ge=0, description="they start uniform in (-spread, spread); ditto: 0.1")
    tail: int = Field(2, ge=1, description="k, last blocks that get pairs, at most all; 2 of 30 can still be held")
    rank: int = Field(8, ge=1, description="r of the pairs; LoRA paper: 8")
    scale: float = Field(2.0, gt=0, description="s of s · B A; LoRA's alpha / r = 16 / 8")

    def attach(self, model: nn.Module, *, basis: Directions | None, seed: int) -> Trainable:
        from kilotune.parametrization._prompts import linear_layers, put_in_front

        wrapped, params = adapted(model, seed, self.rank, self.scale, linear_layers(model, self.tail))
        vectors = put_in_front(model, self.prompts, self.spread, seed)
        return DirectTrainable(wrapped, {PROMPTS: vectors, **params})

    def numbers(self, shapes: dict[str, tuple[int, ...]], hidden: int) -> dict[str, int]:
        """Of the prompts, and of both factors of each linear layer in the tail."""
        block = {name: int(found[1]) for name in shapes if (found := BLOCK.search(name))}
        first = max(block.values(), default=-1) + 1 - self.tail
        tail = {name: shapes[name] for name, at in block.items() if at >= first and len(shapes[name]) == 2}
        return {PROMPTS: self.prompts * hidden} | {name: self.rank * sum(shape) for name, shape in tail.items()}


METHOD = PromptTail
