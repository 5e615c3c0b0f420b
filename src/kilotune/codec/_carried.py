"""Carried: codecs that choose numbers of an update and let another codec carry them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from kilotune.codec import Codec
from kilotune.codec._vector import plain
from kilotune.codec.dense import Dense
from kilotune.core.nested import Nested


class Carried(Codec):
    """What is lost beside the numbers left out is what the inner codec loses."""

    values: Annotated[Codec, Nested("codec")] = Field(default_factory=Dense, description="what carries the numbers")

    _plain = field_validator("values")(plain)

    @property
    def exact(self) -> bool:
        """No: how many bytes the choice takes depends on the numbers."""
        return False

    @property
    def bounded_loss(self) -> bool:
        """As what carries the numbers."""
        return self.values.bounded_loss
