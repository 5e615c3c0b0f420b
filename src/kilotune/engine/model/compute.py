"""Compute: how a forward pass is run — its number format, and whether activations are kept or made twice."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kilotune.core.errors import RecipeError
from kilotune.engine.composing.recipe import Recipe
from kilotune.engine.model.fused import fuse

__all__ = ["Compute", "faster_precision", "layer_stack"]

CLEARLY = 1.3  # bfloat16 costs accuracy, so it has to be this much faster to be chosen
ROWS, WIDTH, INNER = 512, 576, 1536  # a feed-forward product of the embedded model
TRIES = 5


@dataclass(frozen=True)
class Compute:
    """`bfloat16`: matrix products in that format (autocast), weights and sums stay float32. `checkpointing`: share of
    the layers that keep their input only."""

    bfloat16: bool = False
    checkpointing: float = 0.0

    @classmethod
    def of(cls, recipe: Recipe) -> "Compute":
        precision = faster_precision() if recipe.precision == "auto" else recipe.precision
        return cls(precision == "bf16", recipe.checkpointing)

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[None]:
        """Forward passes inside run this way; the backward pass may run outside."""
        fuse(model)
        precision = torch.autocast("cpu", torch.bfloat16) if self.bfloat16 else nullcontext()
        with precision, _checkpointed(model, self.checkpointing) if self.checkpointing else nullcontext():
            yield


@contextmanager
def _checkpointed(model: nn.Module, share: float) -> Iterator[None]:
    """A share of the layers, spread evenly, keep their input only and run again in the backward pass (Chen et al.,
    arXiv 1604.06174)."""
    stack: list[Any] = list(layer_stack(model))
    layers = [layer for at, layer in enumerate(stack) if int((at + 1) * share) > int(at * share)]
    own = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward  # the class's comes back
            if forward is not None:
                layer.forward = forward


def layer_stack(model: nn.Module) -> nn.ModuleList:
    """The model's stack of like layers: its longest list of modules. Raises RecipeError where it has none."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise RecipeError("base: has no list of layers, which checkpointing and emulator need. Use them without it.")
    return max(stacks, key=len)


@lru_cache(maxsize=1)
def faster_precision() -> str:
    """`bf16` where this machine multiplies matrices of bfloat16 clearly faster than float32, else `fp32`; measured."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(ROWS, WIDTH, dtype=dtype), torch.ones(INNER, WIDTH, dtype=dtype)
        taken = []
        for _ in range(TRIES):
            started = time.perf_counter()
            nn.functional.linear(a, b)
            taken.append(time.perf_counter() - started)
        seconds[dtype] = min(taken)
    return "bf16" if seconds[torch.float32] > CLEARLY * seconds[torch.bfloat16] else "fp32"
