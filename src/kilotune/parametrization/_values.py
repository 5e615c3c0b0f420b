"""Values: updates that hold tensors as they are, not how far they moved.

The one exception says that nothing happened: who did not train sends zeros, and a round of zeros leaves everything as
it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kilotune.core.lazy import torch
from kilotune.core.types import TensorUpdate

if TYPE_CHECKING:
    from torch import Tensor


def as_they_are(tensors: dict[str, Tensor], moved: bool) -> TensorUpdate:
    """Copies of the tensors; zeros where none of them moved."""
    make = torch.clone if moved else torch.zeros_like
    return TensorUpdate({name: make(value) for name, value in tensors.items()})


def happened(values: dict[str, Tensor]) -> bool:
    """Whether a round came to anything."""
    return any(bool(value.any()) for value in values.values())
