"""LoRA pairs: w + s · B A, where a round replaces B and A by a pair made from all clients' products.

The adapter goes on from round to round, and clients start from what the last round came to; a client of lower rank
starts from its first components.

Source: Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources"
    (FlexLoRA), arXiv 2402.11505, sec. 3; Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and
    Initialization Refinement", arXiv 2411.14961, sec. 4; the pair itself: Hu et al., arXiv 2106.09685.
Departs: one scale s for all ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from kilotune.parametrization import Directions, Trainable
from kilotune.parametrization._pairs import PairsMethod, PairsTrainable

if TYPE_CHECKING:
    from torch import Tensor, nn


class LoraPairsTrainable(PairsTrainable):
    """A round's pair becomes the adapter."""

    def _take(self, pairs: dict[str, Tensor]) -> None:
        for name, value in self.wire.items():
            value.copy_(pairs[name])


class LoraPairs(PairsMethod):
    gives: ClassVar[frozenset[str]] = frozenset({"values", "factor_pair", "adapter"})

    def attach(self, model: nn.Module, *, basis: Directions | None, seed: int) -> Trainable:
        return LoraPairsTrainable(*self._wrapped(model, seed), self.scale)


METHOD = LoraPairs
