"""Lazy: torch, imported when it is first used, so that recipes can be read, checked and planned without it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            import torch

            return getattr(torch, name)

    torch = _Torch()

__all__ = ["no_grad", "torch"]

F = TypeVar("F", bound=Callable[..., Any])


def no_grad(function: F) -> F:
    """`torch.no_grad()` as a decorator."""

    @functools.wraps(function)
    def without(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return function(*args, **kwargs)

    return without  # type: ignore[return-value]
