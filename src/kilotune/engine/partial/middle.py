"""Middle: the blocks between the trained ends of a model, taken out of it and run thinned, or whole.

A parametrization sees the ends alone: what runs between them is no part of the tree of modules, so that nothing there
has a name, is trained or travels. `whole` puts the full model's own blocks back in their places around the same ends.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kilotune.core.errors import ModelError
from kilotune.engine.composing.plan import Plan
from kilotune.engine.model.base import Base
from kilotune.engine.model.compute import layer_stack
from kilotune.engine.model.fused import fuse
from kilotune.engine.partial.emulator import layout

__all__ = ["Middle"]


class _Gap(nn.Module):
    """In the place of a dropped block."""

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        return hidden_states


class _Frozen(nn.Module):
    """Runs a block that is not found among its modules."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block = (block,)  # in a tuple, where torch does not see it

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._block[0](*args, **kwargs)


class Middle:
    """The middle of one model, thinned from now on."""

    def __init__(self, base: Base, plan: Plan, whole: bool) -> None:
        """`whole`: keep the full model's blocks, which a client does not need. Raises RecipeError, ModelError."""
        self._model = base.model
        self._stack = layer_stack(base.model)
        self.layout = layout(plan.recipe.emulator, len(self._stack))
        blocks = {i: self._stack[i] for i in range(self.layout.left, self.layout.right)}
        self.kept: dict[int, nn.Module] = {i: blocks[i] for i in self.layout.kept}
        self._full = blocks if whole else {}
        if not whole:
            base.forget(self.layout.drops)
        self.thin()
        self._require_plain()

    @property
    def can_be_whole(self) -> bool:
        return bool(self._full)

    @property
    def full(self) -> dict[int, nn.Module]:
        """The full model's blocks by their places. Raises ModelError where they were left out."""
        if not self._full:
            raise ModelError("the middle of this model was left out: it is a client's. Ask the server's replica.")
        return self._full

    def place(self, blocks: dict[int, nn.Module]) -> None:
        """Put these into the model."""
        for at, block in blocks.items():
            self._stack[at] = block

    def thin(self) -> None:
        """Run what the emulator keeps."""
        fuse(nn.ModuleList(self.kept.values()))
        places = range(self.layout.left, self.layout.right)
        self.place({at: _Frozen(self.kept[at]) if at in self.kept else _Gap() for at in places})

    def put_back(self) -> None:
        """Run the full model from now on."""
        self.place(self.full)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The full model inside: what the ends are plugged into."""
        self.put_back()
        try:
            yield
        finally:
            self.thin()

    def copied(self) -> dict[int, nn.Module]:
        """The kept blocks of the full model with weights of their own."""
        return {at: copy.deepcopy(self.full[at]) for at in self.layout.kept}

    @torch.no_grad()
    def _require_plain(self) -> None:
        """A gap hands on one tensor, so every block must."""
        seen: list[object] = []
        handle = self._stack[0].register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            self._model(input_ids=torch.arange(1, 3)[None], use_cache=False)
        finally:
            handle.remove()
        if not isinstance(seen[0], Tensor):
            raise ModelError(
                f"emulator: the blocks of {type(self._model).__name__} pass on more than one tensor, so none can be "
                "left out. Use a Llama-like base."
            )


def name_targets(model: nn.Module) -> None:
    """Let a peft adapter's configuration name the very modules it sits on: read back over the full model it would
    find more of them otherwise."""
    for config in getattr(model, "peft_config", {}).values():
        inner: Any = model
        if getattr(config, "target_modules", None):
            modules = inner.get_base_model().named_modules()
            config.target_modules = {name for name, module in modules if hasattr(module, "base_layer")}
