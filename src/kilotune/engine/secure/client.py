"""The client's side: one session per attempt at a round, and a record of whose sum it has helped to open.

A stage may be asked again with the same words and is answered with the same bytes; with other words it is refused,
because two answers together would give away what one hides. Secrets live in memory only: a client that was killed
counts as dropped in that round, and takes part in the next attempt or round with fresh keys. What it helped to open
is on disk, so that no restart makes it forget.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from kilotune.core.errors import WireError
from kilotune.engine.files import write_json
from kilotune.engine.secure import shamir, wire
from kilotune.engine.secure.masks import KEY_BYTES, KeyPair, add_mask, derive_key, seal, unseal
from kilotune.engine.secure.shamir import SHARE_BYTES

Threshold = Callable[[int], int]
"""Clients in a table -> how many of them must stay."""
Opened = Callable[[set[bytes]], None]
"""Called with the members of a sum before this client helps to open it; raises WireError to refuse."""


class Session:
    """One client in one attempt at one round: keys, shares, vector, survivors, in this order."""

    def __init__(self, me: bytes, number: int, head: str, attempt: str, least: Threshold, opened: Opened) -> None:
        """`me`: this client's member id. `least` follows from the recipe, so that no server can ask for fewer."""
        self.number, self.head, self.attempt = number, head, attempt
        self._me, self._least, self._opened = me, least, opened
        self._share_key, self._mask_key = KeyPair(), KeyPair()
        self._seed = KeyPair().secret  # of the own mask
        self._entries: list[wire.Entry] = []
        self._place = self._threshold = 0
        self._binding = b""
        self._senders: set[int] = set()
        self._held: dict[int, tuple[bytes, bytes]] = {}  # by owner: shares of its mask's seed and of its mask key
        self._asked: dict[bytes, bytes] = {}  # by stage: SHA-256 of what was asked
        self._shares = b""

    def keys(self) -> bytes:
        """Two public keys."""
        return wire.KEYS + self._share_key.public + self._mask_key.public

    def shares(self, threshold: int, table: bytes) -> bytes:
        """Shares of both secrets, sealed for every other client of the table."""
        with self._once(wire.SHARES, threshold.to_bytes(4, "little") + table):
            self._shares = self._shares or self._make_shares(threshold, table)
        return self._shares

    def mask(self, mail: bytes, words: np.ndarray) -> bytes:
        """The words under the own mask and one for each other sender of the mail. `words` are overwritten."""
        if wire.SHARES not in self._asked:
            raise WireError("secure aggregation: got the vector's turn before the shares'.")
        with self._once(wire.VECTOR, mail + words.tobytes()):
            return self._make_vector(mail, words)

    def reveal(self, survivors: bytes) -> bytes:
        """For each sender the share that opens the sum of the survivors, and nothing else."""
        if wire.VECTOR not in self._asked:
            raise WireError("secure aggregation: got the survivors before the vector's turn.")
        with self._once(wire.REVEALED, survivors):
            return self._make_revealed(survivors)

    @contextmanager
    def _once(self, stage: bytes, asked: bytes) -> Iterator[None]:
        """Lets through what was asked first, as often as it is asked. What failed was not answered."""
        digest = hashlib.sha256(asked).digest()
        if self._asked.get(stage, digest) != digest:
            raise WireError(
                f"secure aggregation: asked for {stage.decode()} again with other words. Two different answers in one "
                "round could give an update away, so this client refuses."
            )
        yield
        self._asked[stage] = digest

    def _make_shares(self, threshold: int, table: bytes) -> bytes:
        entries = wire.unpack_table(table)
        own = wire.Entry(self._me, self._share_key.public, self._mask_key.public)
        count = len(entries)
        if own not in entries:
            raise WireError("secure aggregation: got a table without this client's keys.")
        if count < wire.LEAST_CLIENTS or not self._least(count) <= threshold <= count:
            raise WireError(
                f"secure aggregation: got threshold {threshold} of {count} clients, expected at least "
                f"{self._least(max(count, wire.LEAST_CLIENTS))} and no more than there are."
            )
        self._entries, self._place, self._threshold = entries, entries.index(own), threshold
        self._binding = wire.binding_of(self.number, self.head, self.attempt, threshold, table)
        seeds = shamir.split(self._seed, count, threshold)
        keys = shamir.split(self._mask_key.secret, count, threshold)
        self._held[self._place] = (seeds[self._place], keys[self._place])
        sealed = []
        for place, entry in enumerate(entries):
            if place != self._place:
                label = self._label(self._place, place)
                key = self._share_key.agree(entry.share_key, self._binding, label)
                sealed.append(seal(key, seeds[place] + keys[place], label))
        return wire.SHARES + seed_commitment(self._seed, self._binding) + b"".join(sealed)

    def _label(self, sender: int, recipient: int) -> bytes:
        return b"share " + self._entries[sender].member + self._entries[recipient].member

    def _make_vector(self, mail: bytes, words: np.ndarray) -> bytes:
        body, width = wire.open_message(wire.MAIL, mail), wire.set_bytes(len(self._entries))
        senders = wire.unpack_set(body[:width], len(self._entries))
        wire.open_message(wire.MAIL, mail, width + (len(senders) - 1) * wire.SEALED_BYTES)
        if self._place not in senders or len(senders) < self._threshold:
            raise WireError(
                f"secure aggregation: got shares of {len(senders)} clients, expected {self._threshold} with this one."
            )
        others = sorted(senders - {self._place})
        for index, owner in enumerate(others):
            start = width + index * wire.SEALED_BYTES
            self._held[owner] = self._unseal(owner, body[start : start + wire.SEALED_BYTES])
        self._senders = senders
        add_mask(words, derive_key(self._seed, self._binding, b"own mask"), 1)
        for owner in others:
            key = self._mask_key.agree(self._entries[owner].mask_key, self._binding, b"pair mask")
            add_mask(words, key, pair_sign(self._place, owner))
        return wire.VECTOR + words.tobytes()

    def _unseal(self, owner: int, sealed: bytes) -> tuple[bytes, bytes]:
        label = self._label(owner, self._place)
        content = unseal(self._share_key.agree(self._entries[owner].share_key, self._binding, label), sealed, label)
        if content is None or len(content) != 2 * SHARE_BYTES:
            raise WireError(
                f"secure aggregation: the share of member {self._entries[owner].member.hex()} was altered or is not "
                "meant for this client, round or run."
            )
        return content[:SHARE_BYTES], content[SHARE_BYTES:]

    def _make_revealed(self, survivors: bytes) -> bytes:
        count = len(self._entries)
        alive = wire.unpack_set(wire.open_message(wire.SURVIVORS, survivors, wire.set_bytes(count)), count)
        if self._place not in alive or not alive <= self._senders or len(alive) < self._threshold:
            raise WireError(
                f"secure aggregation: got {len(alive)} survivors, expected at least {self._threshold} of the senders, "
                "this client among them."
            )
        self._opened({self._entries[place].member for place in alive})
        return wire.REVEALED + b"".join(self._held[p][0 if p in alive else 1] for p in sorted(self._senders))


class Vault:
    """A client's current session, and the last sum it helped to open."""

    def __init__(self, me: bytes, least: Threshold, path: Path | None) -> None:
        """`path`: where the record of the last sum is kept; None for a simulated client, whose server keeps its own."""
        self._me, self._least, self._path = me, least, path
        self._session: Session | None = None
        self._record: dict[str, object] = {}
        if path is not None and path.exists():
            self._record = json.loads(path.read_text(encoding="utf-8"))

    def begin(self, number: int, head: str, attempt: str) -> bytes:
        """Public keys for an attempt; the secrets of an earlier attempt are forgotten."""
        if self._session is None or (self._session.number, self._session.attempt) != (number, attempt):
            self._session = Session(self._me, number, head, attempt, self._least, self._allow)
        return self.session(number, head, attempt).keys()

    def session(self, number: int, head: str, attempt: str) -> Session:
        """The session of this attempt. Raises WireError when there is none."""
        found = self._session
        if found is None or (found.number, found.head, found.attempt) != (number, head, attempt):
            raise WireError(
                f"round {number}: this client has no keys for this attempt: it was started again since, or the server "
                "was. It takes part again in the next one."
            )
        return found

    def _allow(self, members: set[bytes]) -> None:
        assert self._session is not None, "sums are opened within a session"
        number, head = self._session.number, self._session.head
        record = {"round": number, "head": head, "members": sorted(member.hex() for member in members)}
        same_round = (self._record.get("round"), self._record.get("head")) == (number, head)
        if same_round and self._record != record:
            raise WireError(
                f"round {number}: this client has helped to open the sum of other clients in this round. The "
                "difference of both sums could give an update away, so it refuses."
            )
        if self._path is not None and not same_round:
            write_json(self._path, record)
        self._record = dict(record)


def pair_sign(place: int, other: int) -> int:
    """+1 for the client that comes first, -1 for the other: their common mask cancels in the sum."""
    return 1 if place < other else -1


def seed_commitment(seed: bytes, binding: bytes) -> bytes:
    """32 bytes that fit this seed alone and say nothing about it."""
    commitment = derive_key(seed, binding, b"commitment")
    assert len(commitment) == KEY_BYTES, "commitments are as long as keys"
    return commitment
