"""Warm-up: one codec for the first rounds, another one from then on.

Source: Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed", arXiv
2102.02888: whole numbers while the variance is learned, signs with error feedback afterwards.
Wire: the payload of the round's codec; nothing is added.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator

from kilotune.codec import Codec, State, TensorUpdate, Update, WireContext
from kilotune.codec._vector import plain
from kilotune.codec.dense import Dense
from kilotune.codec.residual import Residual
from kilotune.codec.sign import Sign
from kilotune.core.nested import Nested


class Warmup(Codec):
    """Two codecs, one after the other."""

    example: ClassVar[dict[str, Any]] = {"rounds": 0}

    rounds: int = Field(3, ge=0, description="rounds of the first codec")
    first: Annotated[Codec, Nested("codec")] = Field(default_factory=Dense, description="what makes their bytes")
    codec: Annotated[Codec, Nested("codec")] = Field(
        default_factory=lambda: Residual(codec=Sign()), description="what makes the bytes of all later rounds"
    )

    @field_validator("first", "codec")
    @classmethod
    def _of_tensors(cls, codec: Codec) -> Codec:
        plain(codec.bare)
        return codec

    @property
    def bare(self) -> Codec:
        """What makes the bytes in the end."""
        return self.codec.bare

    @property
    def exact(self) -> bool:
        """Not while both take turns."""
        return self.codec.exact and self.rounds == 0

    @property
    def remembers(self) -> bool:
        """As either codec inside."""
        return self.first.remembers or self.codec.remembers

    @property
    def bounded_loss(self) -> bool:
        """As both codecs inside."""
        return self.first.bounded_loss and self.codec.bounded_loss

    def at(self, round: int) -> Codec:
        """The codec of a round; rounds count from 1."""
        return self.first if round <= self.rounds else self.codec

    def encode(self, update: Update, context: WireContext, state: State) -> bytes:
        return self.at(context.round).encode(update, context, state)

    def decode(self, payload: bytes, context: WireContext) -> TensorUpdate:
        """As the round's codec."""
        update = self.at(context.round).decode(payload, context)
        assert isinstance(update, TensorUpdate), "the codecs inside decode to tensors"
        return update

    def predict_bytes(self, update_numel: dict[str, int], num_pairs: int) -> int:
        """Of the larger of both, so that it bounds every round."""
        parts = [self.codec] if self.rounds == 0 else [self.first, self.codec]
        return max(codec.predict_bytes(update_numel, num_pairs) for codec in parts)

    def carried(self, state: State, root: int) -> State:
        """As the codec that remembers."""
        return self.codec.carried(state, root)


METHOD = Warmup
