"""Int8: weights in eight bits with float32 scales, only ever read; value = int8 · scale of its row or block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kilotune.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Int8:
    """`scales` (n,) float32: one for every values.numel() / n elements in row-major order (n = rows: per row)."""

    values: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        if self.values.dtype != torch.int8 or self.scales.dtype != torch.float32 or self.scales.dim() != 1:
            raise TypeError(
                f"int8 weights: got {self.values.dtype} values and {self.scales.dtype} scales of shape "
                f"{tuple(self.scales.shape)}, expected int8 and float32 (n,)."
            )
        if self.values.numel() % max(1, self.scales.numel()) or bool(self.values.numel()) != bool(self.scales.numel()):
            raise TypeError(
                f"int8 weights: got {self.scales.numel()} scales for {self.values.numel()} values, "
                "expected one for each of equally many values."
            )

    @property
    def shape(self) -> torch.Size:
        return self.values.shape
