"""One byte: the scalar of every forward-only step as a sign and the logarithm of its magnitude; directions follow.

Source: Zelikman et al., "Just One Byte (per gradient): A Note on Low-Bandwidth Decentralized Language Model Finetuning
Using Shared Randomness", arXiv 2306.10015.
Departs: 7 bits of logarithm and the sign are 8 (the published code's 255 levels and a sign are 9, and it sends text);
rounding keeps the mean. Directions follow from round, sender and step, as there, but are those of a basis.
Wire: "ONB1" | u16 n | n bytes, one a step (see _log_byte), 0 for a step without a slope; little-endian, 6 + n bytes.
Decoded: byte · unit along the sender's directions, in the order of its steps.
"""

from __future__ import annotations

import struct
from typing import Literal

import numpy as np
from pydantic import Field

from kilotune.codec import Codec, SeedUpdate, State, Update, WireContext, WireError
from kilotune.codec._frame import check, check_finite, open_header
from kilotune.codec._log_byte import NO_BYTE, from_bytes, to_bytes

HEADER = struct.Struct("<4sH")
MAGIC = b"ONB1"


class OneByte(Codec):
    """Pairs whose directions every receiver can draw itself."""

    takes = "seeds"
    gives = frozenset({"pairs", "sender_bound", "round_bound"})

    unit: float = Field(1.0, gt=0, description="|coefficient| per unit of the byte: the clients' learning rate")
    rounding: Literal["stochastic", "nearest"] = Field(
        "stochastic", description="stochastic: the mean over many roundings is the number itself (ours); paper: nearest"
    )

    def encode(self, update: Update, context: WireContext, state: State) -> bytes:
        """Raises WireError for coefficients that are not finite and for directions the sender does not probe."""
        if not isinstance(update, SeedUpdate) or update.groups is not None:
            raise TypeError("one_byte takes pairs without groups")
        check_finite("one_byte", "the coefficients", update.coefs)
        places = steps_of("one_byte", update.indices, probed("one_byte", context))
        values = np.zeros(places[-1] + 1 if places.size else 0)
        values[places] = update.coefs.astype(np.float64) / self.unit
        codes = to_bytes(values, context.rng if self.rounding == "stochastic" else None)
        return HEADER.pack(MAGIC, codes.size) + codes.tobytes()

    def decode(self, payload: bytes, context: WireContext) -> SeedUpdate:
        """As many pairs as bytes; those of byte 0 move nothing."""
        codes = read(payload)
        directions = probed("one_byte", context)
        if codes.size > directions.size:
            raise WireError(f"one_byte: got {codes.size} steps, expected at most {directions.size}. Use one recipe.")
        coefs = (from_bytes(codes) * self.unit).astype(np.float32)
        return SeedUpdate(directions[: codes.size], coefs, senders=np.full(codes.size, context.sender, np.int64))

    def predict_bytes(self, update_numel: dict[str, int], num_pairs: int) -> int:
        """Exact for a step each: 6 + n."""
        return HEADER.size + num_pairs


def read(payload: bytes) -> np.ndarray:
    """(n,) uint8, the bytes of a payload. Raises WireError when it is cut or foreign."""
    (count,) = open_header("one_byte", HEADER, MAGIC, payload)
    check("one_byte", "length", len(payload), HEADER.size + count)
    return checked("one_byte", np.frombuffer(payload, np.uint8, count, HEADER.size))


def checked(codec: str, codes: np.ndarray) -> np.ndarray:
    """Refuse the one byte that stands for nothing."""
    if (codes == NO_BYTE).any():
        raise WireError(f"{codec}: got byte 0x80, a zero with a sign. The payload is altered.")
    return codes


def probed(codec: str, context: WireContext) -> np.ndarray:
    """(steps,) int64: the directions of all steps the context's sender may take."""
    if context.probes is None:
        raise ValueError(f"{codec}: this context does not know which directions are probed.")
    return context.probes(context.sender)


def steps_of(codec: str, indices: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """(n,) the step of every pair: pairs are in the order of steps, of which some may have left none."""
    places, at = np.empty(indices.size, np.int64), 0
    for number, index in enumerate(indices.tolist()):
        while at < directions.size and directions[at] != index:
            at += 1
        if at == directions.size:
            raise WireError(f"{codec}: got direction {index}, which its sender does not probe there. Use one recipe.")
        places[number] = at
        at += 1
    return places


METHOD = OneByte
