"""Prompts in front of every row: vectors that a decoder puts before the embedded tokens and takes out of its result.

From outside nothing changes: whoever gives T tokens gets T hidden states, with masks and positions of their own, packed
rows and cached ones included.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kilotune.core.errors import RecipeError
from kilotune.core.rng import stream

PARTS = ("embed_tokens", "layers", "norm")


class SoftPrompts(nn.Module):
    """(n, h) vectors."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, h) -> (B, n + T, h)"""
        return torch.cat([self.weight.expand(len(x), *self.weight.shape), x], dim=1)


def decoder_of(model: Any) -> Any:
    """The stack of blocks with its embedding and last norm. Raises RecipeError for a model without such a one."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or not all(hasattr(decoder, part) for part in PARTS):
        raise RecipeError(
            f"parametrization: {type(model).__name__} has no decoder with {', '.join(PARTS)}, as models like Llama "
            "have. Use parametrization: peft."
        )
    return decoder


def linear_layers(model: Any, last: int) -> tuple[str, ...]:
    """Names of the linear layers in the last blocks."""
    blocks = decoder_of(model).layers
    (prefix,) = [name for name, module in model.named_modules() if module is blocks]
    return tuple(
        f"{prefix}.{at}.{name}"
        for at in range(max(0, len(blocks) - last), len(blocks))
        for name, module in blocks[at].named_modules()
        if isinstance(module, nn.Linear)
    )


def put_in_front(model: Any, count: int, spread: float, seed: int) -> nn.Parameter:
    """Give the decoder its prompts, and a forward that uses them."""
    decoder = decoder_of(model)
    start = stream(seed, "prompts").uniform(-spread, spread, (count, decoder.embed_tokens.weight.shape[1]))
    decoder.prompts = SoftPrompts(torch.from_numpy(start).float())
    decoder.forward = partial(_forward, decoder, decoder.forward)
    vectors: nn.Parameter = decoder.prompts.weight
    return vectors


def _forward(
    decoder: Any,
    own: Callable[..., Any],
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    **others: Any,
) -> Any:
    n = len(decoder.prompts.weight)
    first = past_key_values is None or past_key_values.get_seq_length() == 0  # later the cache holds the prompts
    if attention_mask is not None:
        attention_mask = _widened(attention_mask, n, first)
    if position_ids is not None:
        position_ids = position_ids + n
        if first:
            position_ids = torch.cat([torch.arange(n).expand(len(position_ids), n), position_ids], dim=1)
    known = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
    if not first:
        return own(input_ids=input_ids, inputs_embeds=inputs_embeds, **known, **others)
    x = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    output = own(inputs_embeds=decoder.prompts(x), **known, **others)
    output.last_hidden_state = output.last_hidden_state[:, n:]
    return output


def _widened(mask: Tensor, n: int, first: bool) -> Tensor:
    """(B, T) with 1 for what can be seen, or (B, 1, Q, K) that is added to scores: everybody sees the prompts."""
    if mask.dim() == 2:
        return torch.cat([mask.new_ones(len(mask), n), mask], dim=1)
    wide = torch.cat([mask.new_zeros(*mask.shape[:3], n), mask], dim=3)
    if not first:
        return wide
    own = torch.full((n, wide.shape[3]), float("-inf"), dtype=mask.dtype).triu(1)  # prompts see those before them
    return torch.cat([own.expand(len(mask), 1, *own.shape), wide], dim=2)
