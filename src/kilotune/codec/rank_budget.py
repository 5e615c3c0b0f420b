"""Rank budget: of every factor pair as many components as the sender's momentary channel carries in the time there is.

C = bandwidth · log2(1 + 10^(SNR / 10)) bit/s, budget = C · seconds / 8 bytes, and no payload is longer. A component is
worth ‖b_k‖ · ‖a_k‖, for P diag(e) Q |e_k| times the norms of its vectors: what leaving it out changes in the product.
Components of all pairs stand in order of worth per number, and the longest beginning of this order that fits travels.

Source: "AirLLM: Diffusion Policy-based Adaptive LoRA for Remote Fine-Tuning of LLM over the Air" and the authors' code
    (ZJUNICE/AirLLM): the channel, a mask that keeps the first ρ of r components, what is sent.
Departs: the mask is greedy, not drawn by PPO and a diffusion model, and chosen when training is over. The greedy choice
    ends at the first component that does not fit, so that a larger budget keeps all that a smaller one keeps, and more.
    Where AirLLM skips training, when the budget is below the smallest payload, the client does not answer.
Channel: simulated. A sender's SNR is drawn from `snr` by the round's root, the round and the sender's number.
Wire: the payload of `pair_ranks`; the kept components of a pair stand first in it, so that its product is the same.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field, field_validator

from kilotune.codec import State, TensorUpdate, Update, WireContext, WireError
from kilotune.codec._carried import Carried
from kilotune.codec._frame import check_finite
from kilotune.codec._ranks import Modules, filled, fixed_length, modules, num_modules
from kilotune.codec.pair_ranks import PairRanks
from kilotune.core.lazy import torch
from kilotune.core.rng import stream

if TYPE_CHECKING:
    from torch import Tensor


class RankBudget(Carried):
    """Another codec around the components that fit."""

    needs: ClassVar[frozenset[str]] = frozenset({"factor_pair", "fresh_start"})
    gives: ClassVar[frozenset[str]] = frozenset({"values", "any_rank", "rank_each", "own_support", "channel_bound"})

    snr: tuple[float, ...] = Field(
        (-5.0, 0.0, 5.0, 10.0, 15.0), min_length=1, description="dB, one of them in a round; AirLLM: these five"
    )
    bandwidth: float = Field(1e7, gt=0, description="Hz; AirLLM: 1e8 for up to 64 components of OPT-1.3B")
    seconds: float = Field(1.0, gt=0, description="what an update may take on the air; AirLLM: 1 s")

    _fixed = field_validator("values")(fixed_length)

    @property
    def bare(self) -> PairRanks:
        """What makes the bytes."""
        return PairRanks(values=self.values)

    @property
    def bounded_loss(self) -> bool:
        """No: a channel may stay poor."""
        return False

    def budget(self, snr: float) -> int:
        """Bytes that may be sent at this SNR in dB."""
        return math.floor(self.bandwidth * math.log2(1 + 10 ** (snr / 10)) * self.seconds / 8)

    def momentary(self, context: WireContext) -> float:
        """The SNR of a sender in a round."""
        rng = stream(context.root, "channel", context.sender, context.round)
        return self.snr[int(rng.integers(len(self.snr)))]

    def encode(self, update: Update, context: WireContext, state: State) -> bytes:
        """Raises WireError for numbers that are not finite, and when not even an empty payload fits."""
        return self.encode_within(self.budget(self.momentary(context)), update, context)

    def encode_within(self, most: int, update: Update, context: WireContext) -> bytes:
        """A payload of at most so many bytes."""
        if not isinstance(update, TensorUpdate):
            raise TypeError("rank_budget takes tensors, got pairs")
        known, tensors = modules(context.shapes), filled(update, context.shapes)
        for name, tensor in tensors.items():
            check_finite("rank_budget", f"tensor {name!r}", tensor.detach().cpu().numpy())
        for (names, _), keep in zip(known, self._kept(known, tensors, most), strict=True):
            for name, axis in zip(names, (1, 0), strict=False):
                tensors[name] = _first(tensors[name], axis if len(names) > 1 else None, keep)
        return self.bare.encode(TensorUpdate(tensors), context, {})

    def _kept(self, known: Modules, tensors: dict[str, Tensor], most: int) -> list[np.ndarray]:
        """(components,) bool of every module: what travels within so many bytes."""
        sizes = [sum(tensors[name].numel() for name in names) // components for names, components in known]
        each = np.repeat(sizes, [components for _, components in known])
        rates = np.concatenate([_worths(names, tensors) for names, _ in known]) / each
        order = np.argsort(-rates, kind="stable")
        order = order[rates[order] > 0]
        totals = [0, *np.cumsum(each[order]).tolist()]
        count = bisect_right(totals, most, key=lambda total: self.bare.length(len(known), total)) - 1
        if count < 0:
            raise WireError(
                f"rank_budget: got {most} bytes for this round, expected at least {self.bare.length(len(known), 0)}. "
                "The channel is too poor for any answer."
            )
        kept = np.zeros(each.size, bool)
        kept[order[:count]] = True
        return np.split(kept, np.cumsum([components for _, components in known])[:-1])

    def decode(self, payload: bytes, context: WireContext) -> TensorUpdate:
        """As `pair_ranks`."""
        return self.bare.decode(payload, context)

    def predict_bytes(self, update_numel: dict[str, int], num_pairs: int) -> int:
        """All of it, or what the best channel carries."""
        whole = self.bare.length(num_modules(update_numel), sum(update_numel.values()))
        return min(whole, self.budget(max(self.snr)))


def _worths(names: tuple[str, ...], tensors: dict[str, Tensor]) -> np.ndarray:
    """(components,) float64: the Frobenius norm of each component's product, or of the tensor."""
    values = [tensors[name].detach().cpu().double().numpy() for name in names]
    if len(values) == 1:
        return np.array([np.linalg.norm(values[0])])
    b, a = values
    worths: np.ndarray = np.linalg.norm(b, axis=0) * np.linalg.norm(a, axis=1)
    return worths


def _first(tensor: Tensor, axis: int | None, keep: np.ndarray) -> Tensor:
    """What is kept in front, zeros behind; a tensor without components whole or not."""
    if axis is None:
        return tensor if keep.all() else torch.zeros_like(tensor)
    ordered = tensor.detach().index_select(axis, torch.from_numpy(np.argsort(~keep, kind="stable")))
    count = int(keep.sum())
    ordered.narrow(axis, count, keep.size - count).zero_()
    return ordered


METHOD = RankBudget
