"""Overlay: forward passes see changed weights while the stored ones stay as they are.

Each module that owns a covered parameter gets its changed value in a scratch buffer just before its
forward and the stored one back right after, so a probe costs one scratch tensor, writes no weight
and needs no restoring: what is never written cannot drift.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Fill = Callable[[str, Tensor, Tensor], None]
"""fill(name, stored value, scratch of the same shape): write the value the forward pass shall see."""


@contextmanager
def overlaid(model: nn.Module, params: dict[str, nn.Parameter], fill: Fill) -> Iterator[None]:
    """Within, modules compute with what `fill` writes instead of the stored parameters."""
    names = {param: name for name, param in params.items()}
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners[param] = owners.get(param, 0) + 1
    stored = {param: param.data for param in names}
    kept: dict[nn.Parameter, Tensor] = {}  # filled once for parameters with several owners (tied embeddings)
    free: dict[int, list[Tensor]] = {}

    def enter(module: nn.Module, *_: object) -> None:
        for param in module.parameters(recurse=False):
            if param not in names:
                continue
            value = kept.get(param)
            if value is None:
                pool = free.setdefault(param.numel(), [])
                value = (pool.pop() if pool else torch.empty(param.numel())).view(param.shape)
                fill(names[param], stored[param], value)
                if owners[param] > 1:
                    kept[param] = value
            param.data = value

    def leave(module: nn.Module, *_: object) -> None:
        for param in module.parameters(recurse=False):
            if param in names and param.data is not stored[param]:
                if param not in kept:
                    free[param.numel()].append(param.data.view(-1))
                param.data = stored[param]

    handles = []
    for module in model.modules():
        if any(param in names for param in module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for param, value in stored.items():
            param.data = value
