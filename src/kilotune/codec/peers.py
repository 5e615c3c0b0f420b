"""Peers: what each peer sent in a round, side by side, so that everybody adds it up alone: Σ c_ij / n (or / √n).

Source: Zelikman et al., "Just One Byte (per gradient): A Note on Low-Bandwidth Decentralized Language Model Finetuning
Using Shared Randomness", arXiv 2306.10015; √n as in the published code.
Departs: peers are numbers from their names instead of the microsecond they joined; they stand in rising order.
Wire: "PRS1" | u16 G bytes per peer | u32 P peers | P · u32 peer, rising | P · G bytes as in one_byte, 0 behind a peer's
last step; little-endian, 10 + P·(4 + G) bytes. Peer: the first 4 bytes, little-endian, of the SHA-256 of its name.
Decoded: fp32(byte · unit / n), or / √n, along the peer's own directions; n = P.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field

from kilotune.codec import Codec, SeedUpdate, State, Update, WireContext, WireError
from kilotune.codec._frame import check, check_finite, open_header
from kilotune.codec._log_byte import from_bytes, to_bytes
from kilotune.codec.one_byte import checked, probed, read, steps_of

HEADER = struct.Struct("<4sHI")
MAGIC = b"PRS1"


class Peers(Codec):
    """Takes the mean of the peers' steps, as `relay` makes it, and writes down whose byte each was."""

    takes = "seeds"
    gives = frozenset({"pairs", "apart"})

    unit: float = Field(1.0, gt=0, description="|coefficient| per unit of the byte: as in the uplink")
    divide: Literal["count", "root"] = Field(
        "count", description="what the sum over the peers is divided by: n (the mean), or √n as in the paper's code"
    )

    @property
    def exact(self) -> bool:
        """Only when every peer takes one step."""
        return False

    def encode(self, update: Update, context: WireContext, state: State) -> bytes:
        """Raises WireError when two peers have one number."""
        if not isinstance(update, SeedUpdate) or update.groups is not None:
            raise TypeError("peers takes pairs without groups")
        check_finite("peers", "the coefficients", update.coefs)
        owners = np.full(update.indices.size, context.sender) if update.senders is None else update.senders
        peers = np.unique(owners)
        rows = [self._row(update, owners == peer, peers.size, replace(context, sender=int(peer))) for peer in peers]
        codes = np.zeros((peers.size, max((row.size for row in rows), default=0)), np.uint8)
        for at, row in enumerate(rows):
            codes[at, : row.size] = row
        header = HEADER.pack(MAGIC, codes.shape[1], peers.size)
        return header + peers.astype("<u4").tobytes() + codes.tobytes()

    def _row(self, update: SeedUpdate, mine: np.ndarray, count: int, context: WireContext) -> np.ndarray:
        """The bytes of one peer; its share of the mean is one of `count`, so they are the very bytes it sent."""
        places = steps_of("peers", update.indices[mine], probed("peers", context))
        values = np.zeros(places[-1] + 1)
        values[places] = update.coefs[mine].astype(np.float64) * count / self.unit
        return to_bytes(values, None)

    def decode(self, payload: bytes, context: WireContext) -> SeedUpdate:
        """The pairs of all peers, peer after peer."""
        peers, codes = _read(payload)
        directions = [np.zeros(0, np.int64)]
        for peer in peers.tolist():
            known = probed("peers", replace(context, sender=peer))
            if codes.shape[1] > known.size:
                raise WireError(f"peers: got {codes.shape[1]} steps, expected at most {known.size}. Use one recipe.")
            directions.append(known[: codes.shape[1]])
        divisor = np.sqrt(np.float64(peers.size)) if self.divide == "root" else max(1, peers.size)
        coefs = (from_bytes(codes.reshape(-1)) * self.unit / divisor).astype(np.float32)
        return SeedUpdate(np.concatenate(directions), coefs, senders=np.repeat(peers, codes.shape[1]))

    def repeats(self, payload: bytes, own: bytes, context: WireContext) -> bool:
        """Whether the context's sender is either left out or listed with the bytes it sent."""
        peers, codes = _read(payload)
        rows, sent = codes[peers == context.sender], read(own)
        padded = np.zeros(max(codes.shape[1], sent.size), np.uint8)
        padded[: sent.size] = sent
        return all(np.array_equal(np.pad(row, (0, padded.size - row.size)), padded) for row in rows)

    def predict_bytes(self, update_numel: dict[str, int], num_pairs: int) -> int:
        """Exact for peers of one step each, 10 + 5·P; a bound for more."""
        return HEADER.size + 5 * num_pairs


def _read(payload: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(P,) int64 peers and (P, G) uint8 bytes. Raises WireError for a cut or foreign payload."""
    width, count = open_header("peers", HEADER, MAGIC, payload)
    check("peers", "length", len(payload), HEADER.size + count * (4 + width))
    if count and not width:
        raise WireError("peers: got peers without a step, expected at least one each. The payload is altered.")
    peers = np.frombuffer(payload, "<u4", count, HEADER.size).astype(np.int64)
    if (np.diff(peers) <= 0).any():
        raise WireError("peers: got peers out of order, expected rising numbers. The payload is altered.")
    codes = np.frombuffer(payload, np.uint8, count * width, HEADER.size + 4 * count)
    return peers, checked("peers", codes).reshape(count, width)


METHOD = Peers
