"""Basis: publicly known directions in weight space, so that a change of all weights is a few numbers.

Two vocabularies for the same change. *Coordinates* (size,) are what `add` and `project` work with;
*pairs* (direction index, coefficient) are what forward-only steps produce. `coordinates` turns pairs
into coordinates. For `seeds` both coincide; for `tiled` they are related by the Hadamard matrix.

Everything here is a pure function of (root, tensor name, element index): tensor order, frozen
tensors, thread count and process do not matter. All arithmetic on weights is float32, element-wise
and in a fixed order, so two machines that apply the same coordinates hold the same bits.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from kilotune.core.int8 import Int8
from kilotune.core.method import Method
from kilotune.core.types import SeedUpdate

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Basis", "Int8", "SeedUpdate"]


class Basis(Method):
    """Contract. E[z zᵀ] = I for every direction z over its noise.

    `one_pass` is True when any coordinates cost one pass over a weight, however many are non-zero.
    """

    one_pass: ClassVar[bool] = False

    size: int = Field(4096, ge=1, description="number of directions: the dial between bytes and progress")
    refresh: Literal["round", "run"] = Field("round", description="fresh noise each round, or one for the whole run")
    scale: Literal["rms", "none"] = Field(
        "rms", description="multiply each tensor's share by the rms of its base weights, or not at all"
    )

    @abstractmethod
    def coordinates(self, update: SeedUpdate) -> Tensor:
        """(size,) float32: Σ coef · direction(index) in coordinates. Order of pairs does not change the bits."""

    @abstractmethod
    def direction(self, index: int) -> Tensor:
        """(size,) float32: coordinates of one direction with unit coefficient."""

    @abstractmethod
    def add(
        self,
        weight: Tensor | Int8,
        name: str,
        steps: list[tuple[int, Tensor]],
        out: Tensor | None = None,
        start: int = 0,
    ) -> Tensor:
        """weight + Σ over steps (root, coordinates (size,)), applied one step after the other in float32.

        `weight` is contiguous, of any shape, `name` its tensor name. Writes into `out` (may be `weight` itself;
        default: `weight`, in place) and returns it. Coordinates are already scaled. A slice of a tensor, such as
        some rows, gives its first element's place in the whole as `start`. Weights in bf16, fp16 or int8 are only
        read, widened to float32 as they are; `out` is float32, or bf16, rounded once after the last addition.
        """

    @abstractmethod
    def add_both(
        self,
        weight: Tensor | Int8,
        name: str,
        root: int,
        coordinates: Tensor,
        plus: Tensor,
        minus: Tensor,
        start: int = 0,
        opposite: Tensor | None = None,
    ) -> None:
        """`add` of one step into `plus`, and of `opposite` (default: -coordinates) into `minus`, in one pass.

        The bits are those of two calls of `add`. `weight` is only read; the three must not overlap.
        """

    @abstractmethod
    def project(self, gradient: Tensor, name: str, root: int) -> Tensor:
        """(size,) float32: the inner product of the gradient with every coordinate's direction."""
