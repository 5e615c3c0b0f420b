"""The server's side of one attempt at a round: a state machine without a network. It keeps one sum, no vector.

It trusts nothing it receives: every size, every sender and every repetition is checked, a recovered secret has to fit
what its owner said of it, and one wrong share is found and left out.
"""

import hmac
from collections.abc import Callable
from enum import IntEnum
from functools import partial

import numpy as np

from kilotune.core.errors import FederationError, WireError
from kilotune.engine.secure import shamir, wire
from kilotune.engine.secure.client import pair_sign, seed_commitment
from kilotune.engine.secure.fixed import FRONT, FixedPoint
from kilotune.engine.secure.masks import KEY_BYTES, KeyPair, add_mask, derive_key
from kilotune.engine.secure.shamir import SHARE_BYTES

NOBODY = -1


class Stage(IntEnum):
    """What is being collected."""

    KEYS, SHARES, VECTORS, REVEALED = range(4)


class ServerSession:
    """Collects keys, shares, vectors and revealed shares, in this order, each at most once from each client."""

    def __init__(
        self,
        number: int,
        head: str,
        attempt: str,
        members: dict[str, bytes],
        threshold: int,
        numbers: int,
        grid: FixedPoint,
    ) -> None:
        """`members`: the clients asked and their ids. `numbers`: length of an update."""
        if len(members) < wire.LEAST_CLIENTS or len(set(members.values())) < len(members):
            raise ValueError(f"secure aggregation: got {len(members)} clients, expected several with different ids.")
        self.number, self.head, self.attempt, self.threshold = number, head, attempt, threshold
        self._members, self._size, self._dtype = members, FRONT + numbers, grid.dtype
        self._stage = Stage.KEYS
        self._keys: dict[str, wire.Entry] = {}
        self._table = b""
        self._names: list[str] = []  # by place
        self._places: dict[str, int] = {}
        self._sealed: dict[int, bytes] = {}
        self._commitments: dict[int, bytes] = {}
        self._sum = np.zeros(self._size, self._dtype)
        self._alive: set[int] = set()
        self._revealed: dict[int, list[bytes]] = {}  # by who revealed: a share of each sender's, in order
        self._liars: set[int] = set()
        self._factors: dict[tuple[int, ...], list[int]] = {}  # by who is listened to

    # -- what arrives -----------------------------------------------------------------------------------------

    def take_keys(self, client: str, payload: bytes) -> None:
        self._expect(Stage.KEYS, client, client in self._members, client in self._keys)
        raw = wire.open_message(wire.KEYS, payload, 2 * KEY_BYTES)
        entry = wire.Entry(self._members[client], raw[:KEY_BYTES], raw[KEY_BYTES:])
        known = {key for other in self._keys.values() for key in (other.share_key, other.mask_key)}
        if entry.share_key in known or entry.mask_key in known or entry.share_key == entry.mask_key:
            raise WireError("secure aggregation: got a public key that is there already.")
        self._keys[client] = entry

    def take_shares(self, client: str, payload: bytes) -> None:
        place = self._places.get(client, NOBODY)
        self._expect(Stage.SHARES, client, place != NOBODY, place in self._sealed)
        body = wire.open_message(wire.SHARES, payload, KEY_BYTES + (len(self._names) - 1) * wire.SEALED_BYTES)
        self._commitments[place], self._sealed[place] = body[:KEY_BYTES], body[KEY_BYTES:]

    def take_vector(self, client: str, payload: bytes) -> None:
        """Goes into the sum at once."""
        place = self._places.get(client, NOBODY)
        self._expect(Stage.VECTORS, client, place in self._sealed, place in self._alive)
        body = wire.open_message(wire.VECTOR, payload, self._size * self._dtype.itemsize)
        self._sum += np.frombuffer(body, self._dtype)
        self._alive.add(place)

    def take_revealed(self, client: str, payload: bytes) -> None:
        place = self._places.get(client, NOBODY)
        self._expect(Stage.REVEALED, client, place in self._alive, place in self._revealed)
        body = wire.open_message(wire.REVEALED, payload, len(self._sealed) * SHARE_BYTES)
        self._revealed[place] = [body[i : i + SHARE_BYTES] for i in range(0, len(body), SHARE_BYTES)]

    # -- what is sent -----------------------------------------------------------------------------------------

    def table(self) -> bytes:
        """For everybody whose keys are here; ends the collection of keys."""
        if self._stage == Stage.KEYS:
            self._enough("sent keys", len(self._keys))
            self._names = sorted(self._keys)
            self._places = {name: place for place, name in enumerate(self._names)}
            self._table = wire.pack_table([self._keys[name] for name in self._names])
            self._stage = Stage.SHARES
        return self._table

    def senders(self) -> list[str]:
        """Who may send a vector; ends the collection of shares."""
        if self._stage == Stage.SHARES:
            self._enough("sent shares", len(self._sealed))
            self._stage = Stage.VECTORS
        return self.names(Stage.SHARES)

    def mail(self, client: str) -> bytes:
        """What the others sealed for this client."""
        place = self._places[client]
        parts = []
        for sender in sorted(set(self._sealed) - {place}):
            start = (place - (place > sender)) * wire.SEALED_BYTES  # a sender seals nothing for itself
            parts.append(self._sealed[sender][start : start + wire.SEALED_BYTES])
        return wire.MAIL + wire.pack_set(set(self._sealed), len(self._names)) + b"".join(parts)

    def survivors(self) -> bytes:
        """Whose vectors are in the sum, for all of them; ends the collection of vectors."""
        if self._stage == Stage.VECTORS:
            self._enough("sent a masked update", len(self._alive))
            self._stage = Stage.REVEALED
        return wire.SURVIVORS + wire.pack_set(self._alive, len(self._names))

    def names(self, stage: Stage) -> list[str]:
        """Whose part of this stage is here."""
        if stage == Stage.KEYS:
            return sorted(self._keys)
        places = {Stage.SHARES: self._sealed, Stage.VECTORS: self._alive, Stage.REVEALED: self._revealed}[stage]
        return [self._names[place] for place in sorted(places)]

    def liars(self) -> list[str]:
        """Whose shares were found wrong and left out."""
        return [self._names[place] for place in sorted(self._liars)]

    # -- the sum ----------------------------------------------------------------------------------------------

    def total(self) -> np.ndarray:
        """(3 + n,) words: the sum of the survivors' integers. Raises FederationError when it cannot be opened."""
        self._enough("revealed their shares", len(self._revealed))
        words = self._sum.copy()
        binding = wire.binding_of(self.number, self.head, self.attempt, self.threshold, self._table)
        for index, owner in enumerate(sorted(self._sealed)):
            if owner in self._alive:
                seed = self._recover(index, owner, partial(_commits_to, binding, self._commitments[owner]))
                add_mask(words, derive_key(seed, binding, b"own mask"), -1)
                continue
            public = self._entry(owner).mask_key
            pair = KeyPair(self._recover(index, owner, partial(_belongs_to, public)))
            for survivor in sorted(self._alive):
                key = pair.agree(self._entry(survivor).mask_key, binding, b"pair mask")
                add_mask(words, key, -pair_sign(survivor, owner))
        return words

    def _recover(self, index: int, owner: int, fits: Callable[[bytes], bool]) -> bytes:
        """The secret whose shares stand at this index; one wrong share is found by leaving each out in turn."""
        voices = [place for place in sorted(self._revealed) if place not in self._liars]
        for left_out in (NOBODY, *voices[: self.threshold]):
            chosen = tuple(place for place in voices if place != left_out)[: self.threshold]
            if len(chosen) < self.threshold:
                break
            if chosen not in self._factors:
                self._factors[chosen] = shamir.at_zero([place + 1 for place in chosen])
            secret = shamir.join([self._revealed[place][index] for place in chosen], self._factors[chosen])
            if secret is not None and fits(secret):
                self._liars |= {left_out} - {NOBODY}
                return secret
        raise FederationError(
            f"round {self.number}: the shares of {self._names[owner]!r} do not fit what it said of its secret, so the "
            "sum cannot be opened. It or more than one other client is broken. Run the same command again."
        )

    def _entry(self, place: int) -> wire.Entry:
        return self._keys[self._names[place]]

    def _expect(self, stage: Stage, client: str, invited: bool, again: bool) -> None:
        if self._stage != stage or not invited:
            raise WireError(f"secure aggregation: got {stage.name.lower()} of {client!r}, who was not asked for them.")
        if again:
            raise WireError(f"secure aggregation: got {stage.name.lower()} of {client!r} twice.")

    def _enough(self, what: str, count: int) -> None:
        if count < self.threshold:
            raise FederationError(
                f"round {self.number}: {count} of {len(self._members)} clients {what}, secure aggregation needs "
                f"{self.threshold}. Nothing was learnt of any of them. Run the same command again when they are back."
            )


def _commits_to(binding: bytes, commitment: bytes, seed: bytes) -> bool:
    return hmac.compare_digest(seed_commitment(seed, binding), commitment)


def _belongs_to(public: bytes, secret: bytes) -> bool:
    return hmac.compare_digest(KeyPair(secret).public, public)
