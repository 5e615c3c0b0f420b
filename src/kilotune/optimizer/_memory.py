"""What rules keep beside a parameter: in float32, or float64 where the parameter is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kilotune.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def working_dtype(param: Tensor) -> torch.dtype:
    """float32 for every parameter type but float64."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def zeros_for(param: Tensor) -> Tensor:
    """Zeros of the parameter's shape, to be kept."""
    return torch.zeros_like(param, dtype=working_dtype(param), requires_grad=False)
