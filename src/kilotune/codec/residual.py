"""Residual: error feedback around another codec: sent = C(x + e), e = x + e - decoded(sent).

Source: Seide et al., "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed Training of
Speech DNNs", 2014; Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", arXiv
1901.09847.
Departs: numbers of a basis carry over only to rounds of the same root, since under another one they are another
direction.
Wire: the payload of the codec inside; nothing is added.
Memory: one float32 copy of the update between rounds.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from kilotune.codec import Codec, State, TensorUpdate, Update, WireContext
from kilotune.codec._blocks import signed
from kilotune.codec._frame import check_tensors
from kilotune.codec._vector import plain
from kilotune.codec.topk import TopK
from kilotune.core.lazy import torch
from kilotune.core.nested import Nested


class Residual(Codec):
    """Sum of what was decoded so far + residual = sum of all updates."""

    codec: Annotated[Codec, Nested("codec")] = Field(
        default_factory=TopK, description="what makes the bytes; what it loses is added to the next update"
    )

    @field_validator("codec")
    @classmethod
    def _correctable(cls, codec: Codec) -> Codec:
        if not plain(codec).bounded_loss:
            raise ValueError(
                "a codec whose losses do not grow when they are sent again: randomk with unbiased: false, quantized "
                "with rounding: nearest or smaller blocks, ternary with scale: mean"
            )
        return codec

    @property
    def bare(self) -> Codec:
        """The codec inside."""
        return self.codec.bare

    @property
    def exact(self) -> bool:
        """As the codec inside."""
        return self.codec.exact

    @property
    def remembers(self) -> bool:
        """Always."""
        return True

    def encode(self, update: Update, context: WireContext, state: State) -> bytes:
        """State: `residual/<name>` float32; over a basis also `residual_root` () int64, the root they belong to."""
        if not isinstance(update, TensorUpdate):
            raise TypeError("residual takes tensors, got pairs")
        check_tensors("residual", update.tensors, context.shapes)
        kept = self.carried(state, context.root)
        total = {name: tensor.detach().cpu().float() for name, tensor in update.tensors.items()}
        for name in total:
            if f"residual/{name}" in kept:
                total[name] = total[name] + kept[f"residual/{name}"]
        payload = self.codec.encode(TensorUpdate(total), context, {})
        for name, sent in self.decode(payload, context).tensors.items():
            state[f"residual/{name}"] = total[name] - sent
        if context.size:
            state["residual_root"] = torch.tensor(signed(context.root), dtype=torch.int64)
        return payload

    def carried(self, state: State, root: int) -> State:
        """Residuals; over a basis only if the root is still theirs."""
        last = state.get("residual_root")
        return state if last is None or int(last) == signed(root) else {}

    def decode(self, payload: bytes, context: WireContext) -> TensorUpdate:
        """As the codec inside."""
        update = self.codec.decode(payload, context)
        assert isinstance(update, TensorUpdate), "the codec inside decodes to tensors"
        return update

    def predict_bytes(self, update_numel: dict[str, int], num_pairs: int) -> int:
        """As the codec inside."""
        return self.codec.predict_bytes(update_numel, num_pairs)


METHOD = Residual
