"""Identity of a run, and what its clients remember of it: every head the server has signed.

A server's run folder holds `identity.json`: the run's random name and how often it was started. A client's folder
holds `heads.jsonl`: the rounds it followed, each with what its hash is made of, and the server's signed statements
about them. So a server that takes rounds back, or shows two clients different histories, has signed the proof.
"""

import hashlib
import json
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kilotune.core.errors import FederationError, RunError, WireError
from kilotune.engine.files import append_line, write_json
from kilotune.engine.flower.seals import SERVER, SIGNATURE_BYTES, Statement, load_public, verify
from kilotune.engine.rounds.ledger import MEMBERS_BYTES, canonical, chained

IDENTITY, HEADS = "identity.json", "heads.jsonl"
FORMAT = "kilotune-heads-1"


class HistoryError(FederationError):
    """The server's history is not the one it has signed before."""


@dataclass(frozen=True)
class RunIdentity:
    """`run`: 32 hex digits nobody else has; `start`: larger than at any earlier start of this run."""

    run: str
    start: int

    @classmethod
    def fresh(cls) -> "RunIdentity":
        """Of a run that lives as long as this process."""
        return cls(secrets.token_hex(16), int(time.time()))


def open_identity(folder: Path) -> RunIdentity:
    """The identity of the run in this folder, made at its first start.

    The time is in `start` so that a folder restored from a backup is ahead of what it was when it was lost.
    """
    path = folder / IDENTITY
    run, before = secrets.token_hex(16), 0
    if path.exists():
        try:
            content = json.loads(path.read_text())
            run, before = str(content["run"]), int(content["start"])
            if len(bytes.fromhex(run)) != 16:
                raise ValueError
        except (ValueError, LookupError, TypeError):
            raise RunError(f"{path}: cut or foreign. Put it back, or use another --output.") from None
    identity = RunIdentity(run, max(before + 1, int(time.time())))
    write_json(path, asdict(identity))
    return identity


@dataclass(frozen=True)
class Link:
    """One round as a client saw it: what its head is made of."""

    round: int
    previous: str
    root: int
    members: str
    payload: str
    head: str

    def fits(self) -> bool:
        wanted = chained(self.previous, self.round, self.root, bytes.fromhex(self.members), bytes.fromhex(self.payload))
        return wanted == self.head


@dataclass(frozen=True)
class Signed:
    """A statement of the server and its signature: evidence that anyone with its key can check."""

    statement: Statement
    signature: str


class Heads:
    """What one client knows of the history, in memory and, with a folder, on disk."""

    def __init__(self, federation: str, client: str, server_key: bytes, folder: Path | None = None) -> None:
        self.federation, self.client, self.server_key = federation, client, server_key.decode()
        self._key = load_public(server_key)
        self.path = None if folder is None else folder / HEADS
        self.number = 0  # of the last request that was answered
        self.links: dict[int, Link] = {}  # rounds that a signed head stands on
        self.signed: dict[int, Signed] = {}
        self._following: dict[int, Link] = {}  # rounds received, before the request that brought them has passed
        if self.path is not None and self.path.exists():
            found = read_heads(self.path)
            if (found.federation, found.client, found.server_key) != (federation, client, self.server_key):
                raise FederationError(
                    f"{self.path}: kept by client {found.client!r} of federation {found.federation}, this is "
                    f"{client!r} of {federation}, or the server has another key now. Use another --output."
                )
            self.number, self.links, self.signed = found.number, found.links, found.signed

    @property
    def rounds(self) -> int:
        """Rounds the server has signed."""
        return max(self.signed, default=0)

    def check(self, statement: Statement) -> None:
        """Raises WireError for a request of another run or one that came before, HistoryError for another history."""
        if self.rounds and statement.run != (ours := self.signed[self.rounds].statement.run):
            raise WireError(
                f"it belongs to run {statement.run[:8]}, this client's folder to run {ours[:8]}. "
                "Use another --output for another run"
            )
        if statement.number <= self.number:
            raise WireError(f"request {statement.number} is a copy or came too late: {self.number} was answered before")
        if self.rounds and not statement.head:
            raise WireError("it does not say on which history it stands")
        if statement.rounds < self.rounds:
            raise HistoryError(
                f"the server took rounds back: it offers {statement.rounds}, but signed round {self.rounds} before "
                f"({self._evidence()})."
            )
        known = self.links.get(statement.rounds)
        if known is not None and known.head != statement.head:
            raise HistoryError(
                f"the server shows another round {statement.rounds} than it signed before: {statement.head[:16]}, "
                f"before {known.head[:16]} ({self._evidence()})."
            )

    def follow(self, round: int, previous: str, root: int, part: bytes) -> str:
        """The head after a round that was received. Raises HistoryError when another one was signed."""
        members, payload = part[:MEMBERS_BYTES], hashlib.sha256(part[MEMBERS_BYTES:]).digest()
        head = chained(previous, round, root, members, payload)
        known = self.links.get(round)
        if known is not None and known.head != head:
            raise HistoryError(
                f"round {round} leads to head {head[:16]}, but the server signed {known.head[:16]} before "
                f"({self._evidence()})."
            )
        if known is None:
            self._following[round] = Link(round, previous, root, members.hex(), payload.hex(), head)
        return head

    def note(self, statement: Statement, signature: bytes) -> None:
        """The request was answered: what it said of the history stands."""
        self.number = max(self.number, statement.number)
        new, self._following = self._following, {}
        if statement.rounds <= self.rounds or statement.head != _head(new, self.links, statement.rounds):
            return  # nothing new, or refused by the client
        added = [new[number] for number in sorted(new) if number <= statement.rounds]
        kept = Signed(statement, signature.hex())
        self.links |= {link.round: link for link in added}
        if self.path is not None:
            lines = [canonical(asdict(link)) for link in added] + [canonical(asdict(kept))]
            if not self.path.exists():
                header = {"federation": self.federation, "client": self.client, "server_key": self.server_key}
                lines.insert(0, canonical({"format": FORMAT, **header}))
            append_line(self.path, b"\n".join(lines))
        self.signed[statement.rounds] = kept

    def _evidence(self) -> str:
        return "signed in this process" if self.path is None else f"proof in {self.path}"


def _head(new: dict[int, Link], old: dict[int, Link], round: int) -> str | None:
    found = new.get(round) or old.get(round)
    return found.head if found is not None else None


def read_heads(path: Path) -> Heads:
    """What a client remembered, every signature and every link of it checked. Raises WireError or RunError."""
    if path.is_dir():
        path /= HEADS
    if not path.exists():
        raise RunError(f"{path}: no such file. Name the folder of a client that took part in a round.")
    number = 1
    try:
        raw = path.read_bytes()
        lines = raw[: raw.rfind(b"\n") + 1].splitlines()
        header = json.loads(lines[0])
        if header.pop("format") != FORMAT:
            raise ValueError("of another version of kilotune")
        heads = Heads(header["federation"], header["client"], header["server_key"].encode())
        for number, line in enumerate(lines[1:], 2):  # noqa: B007 (told when a line does not fit)
            _take(heads, json.loads(line))
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise WireError(f"{path}:{number}: cut or foreign: {error}.") from None
    heads.path = path
    return heads


def _take(heads: Heads, content: dict[str, Any]) -> None:
    if "signature" not in content:
        link = Link(**content)
        before = heads.links.get(link.round - 1)
        if not link.fits() or (before is not None and before.head != link.previous):
            raise ValueError(f"round {link.round} does not follow from what is before it")
        heads.links[link.round] = link
        return
    signed = Signed(Statement(**content["statement"]), content["signature"])
    said = signed.statement
    known = heads.links.get(said.rounds)
    right = (said.federation, said.sender) == (heads.federation, SERVER) and known is not None
    if not right or known is None or known.head != said.head or len(signed.signature) != 2 * SIGNATURE_BYTES:
        raise ValueError("a statement about other rounds")
    if not verify(heads._key, said, bytes.fromhex(signed.signature)):
        raise ValueError(f"the signature over round {said.rounds} does not fit")
    heads.signed[said.rounds] = signed
    heads.number = max(heads.number, said.number)


@dataclass(frozen=True)
class Comparison:
    """Of what two clients were shown. `rounds`: how many of them both hold and agree on; `conflict`: the first round
    that differs; `proof`: for each client the server's signed statement that stands on its version of that round."""

    run: str
    clients: tuple[str, str]
    rounds: int
    conflict: int | None = None
    proof: tuple[Signed, Signed] | None = None

    @property
    def agree(self) -> bool:
        return self.conflict is None


def compare_heads(one: Path, other: Path) -> Comparison:
    """Whether the server showed two clients one history. Files or client folders; raises WireError when either is
    altered, FederationError when they are of different federations or runs."""
    a, b = read_heads(one), read_heads(other)
    if (a.federation, a.server_key) != (b.federation, b.server_key):
        raise FederationError(f"{one} and {other}: of federations {a.federation} and {b.federation}, or other keys.")
    runs = {signed.statement.run for heads in (a, b) for signed in heads.signed.values()}
    if len(runs) != 1:
        raise FederationError(f"{one} and {other}: of {len(runs)} different runs, so there is nothing to compare.")
    both = sorted(n for n in a.links.keys() & b.links.keys() if n <= min(a.rounds, b.rounds))
    names, run = (a.client, b.client), runs.pop()
    for count, number in enumerate(both):
        if a.links[number].head != b.links[number].head:
            return Comparison(run, names, count, number, (_covering(a, number), _covering(b, number)))
    return Comparison(run, names, len(both))


def _covering(heads: Heads, round: int) -> Signed:
    return heads.signed[min(number for number in heads.signed if number >= round)]
