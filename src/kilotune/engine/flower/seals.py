"""Seals: who says what to whom, in which run and after which history, signed, so that none of it can be changed,
used twice or used elsewhere.

Statement: JSON with sorted keys of the fields of `Statement`, behind `kilotune-message-1`; ECDSA with SHA-256 on
P-256, r and s as 32 bytes each. The keys are those of server certificate and join file.
Wire, one entry `seal` per message: number u64 little-endian | run 16 | signature 64 | name of the client, UTF-8. All
other fields of the statement follow from the message and from what the receiver knows.
"""

import hashlib
import json
import struct
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from kilotune.core.errors import WireError

TAG = b"kilotune-message-1"
SERVER = ""  # in a statement; no client can have this name
RUN_BYTES, SIGNATURE_BYTES = 16, 64
FIXED = 8 + RUN_BYTES + SIGNATURE_BYTES
LONGEST_NAME = 64


@dataclass(frozen=True)
class Statement:
    """What a signature stands for. `number` rises with every request of a run, also over restarts of the server, and
    a reply repeats it. `rounds` and `head`: the history the sender stands on; `round`: the one asked for, or 0."""

    federation: str
    run: str
    number: int
    sender: str
    recipient: str
    kind: str
    round: int
    rounds: int
    head: str
    content: str

    def to_bytes(self) -> bytes:
        """What is signed."""
        return TAG + json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()


class Signable(Protocol):
    """What these keys sign."""

    def to_bytes(self) -> bytes: ...


class Said(Protocol):
    """The part of a request or a reply that is signed."""

    @property
    def body(self) -> Mapping[str, str | int | float | bool]: ...
    @property
    def payloads(self) -> tuple[bytes, ...]: ...


def content_digest(said: Said, error: str | None = None) -> str:
    """SHA-256 over facts, payloads and error. Each part goes in with its kind and length, facts by rising name."""
    whole = hashlib.sha256()

    def add(kind: bytes, content: bytes) -> None:
        whole.update(kind + len(content).to_bytes(8, "little"))
        whole.update(content)

    for name in sorted(said.body):
        value = said.body[name]
        add(b"n", name.encode())
        if isinstance(value, bool):
            add(b"b", bytes([value]))
        elif isinstance(value, int):
            add(b"i", value.to_bytes(8, "little", signed=True))
        elif isinstance(value, float):
            add(b"f", struct.pack("<d", value))
        else:
            add(b"t", value.encode())
    for payload in said.payloads:
        add(b"p", payload)
    if error is not None:
        add(b"e", error.encode())
    return whole.hexdigest()


def sign(key: ec.EllipticCurvePrivateKey, statement: Signable) -> bytes:
    r, s = decode_dss_signature(key.sign(statement.to_bytes(), ec.ECDSA(SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def verify(key: ec.EllipticCurvePublicKey, statement: Signable, signature: bytes) -> bool:
    if len(signature) != SIGNATURE_BYTES:
        return False
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    try:
        key.verify(encode_dss_signature(r, s), statement.to_bytes(), ec.ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return True


def load_public(pem: bytes) -> ec.EllipticCurvePublicKey:
    """Raises ValueError for another kind of key."""
    try:
        key = load_pem_public_key(pem)
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("its key is of another kind")
    return key


@dataclass(frozen=True)
class Seal:
    """What of a statement travels, and its signature."""

    number: int
    run: str
    signature: bytes
    name: str

    def to_bytes(self) -> bytes:
        return self.number.to_bytes(8, "little") + bytes.fromhex(self.run) + self.signature + self.name.encode()

    @classmethod
    def read(cls, raw: bytes | None) -> "Seal":
        """Raises WireError when there is none, or when it is none."""
        if raw is None:
            raise WireError("it is not signed")
        if not FIXED < len(raw) <= FIXED + LONGEST_NAME:
            raise WireError(f"its seal has {len(raw)} bytes")
        try:
            name = raw[FIXED:].decode()
        except UnicodeDecodeError:
            raise WireError("its seal names nobody") from None
        run = raw[8 : 8 + RUN_BYTES].hex()
        return cls(int.from_bytes(raw[:8], "little"), run, raw[8 + RUN_BYTES : FIXED], name)


def request_statement(federation: str, seal: Seal, kind: str, request: Said) -> Statement:
    """What the server says with a request."""
    round, rounds, head = _standing(request, "rounds")
    content = content_digest(request)
    return Statement(federation, seal.run, seal.number, SERVER, seal.name, kind, round, rounds, head, content)


def reply_statement(asked: Statement, reply: Said, error: str | None) -> Statement:
    """What a client says with its reply to a request."""
    _, rounds, head = _standing(reply, "round")
    content = content_digest(reply, error)
    return Statement(
        asked.federation,
        asked.run,
        asked.number,
        asked.recipient,
        SERVER,
        f"{asked.kind} reply",
        asked.round,
        rounds,
        head,
        content,
    )


def _standing(said: Said, rounds: str) -> tuple[int, int, str]:
    """(round asked for, rounds held, head) as the facts tell; the content's digest covers whatever else they are."""
    body = said.body
    number, held, head = body.get("round", 0), body.get(rounds, 0), body.get("head", "")
    return (
        number if type(number) is int else 0,
        held if type(held) is int else 0,
        head if isinstance(head, str) else "",
    )


class Desk:
    """The server's side: seals requests, and lets in one reply for each, from the client it went to."""

    def __init__(
        self, federation: str, run: str, start: int, key: ec.EllipticCurvePrivateKey, clients: Mapping[str, bytes]
    ) -> None:
        """`clients`: name -> public key (PEM). `start` has to be larger than in any earlier process of this run."""
        self._federation, self.run, self._key = federation, run, key
        self._keys = {name: load_public(pem) for name, pem in clients.items()}
        self._number = start << 24
        self._open: dict[str, Statement] = {}
        self._answered: dict[str, int] = {}
        self._lock = threading.Lock()

    def seal(self, name: str, kind: str, request: Said) -> bytes:
        """For the next request to this client; the one before counts no more."""
        with self._lock:
            self._number += 1
            blank = Seal(self._number, self.run, b"", name)
            statement = request_statement(self._federation, blank, kind, request)
            self._open[name] = statement
        return Seal(blank.number, self.run, sign(self._key, statement), name).to_bytes()

    def withdraw(self, name: str) -> None:
        """Expect no reply from this client any more."""
        with self._lock:
            self._open.pop(name, None)

    def kind(self, name: str) -> str | None:
        """Of the request that is open for this client."""
        statement = self._open.get(name)
        return statement.kind if statement is not None else None

    def admit(self, speaker: str, reply: Said, error: str | None, raw: bytes | None) -> None:
        """Take the reply of the client that TLS or Flower found to be speaking; a second one is refused.

        Raises WireError with the reason.
        """
        seal = Seal.read(raw)
        if seal.name != speaker:
            raise WireError(f"it is a reply of client {seal.name!r}, brought by {speaker!r}")
        if seal.run != self.run:
            raise WireError(f"it belongs to run {seal.run[:8]}, this is run {self.run[:8]}")
        with self._lock:
            asked = self._open.get(speaker)
            if seal.number <= self._answered.get(speaker, 0):
                raise WireError(f"request {seal.number} was answered before: this is a copy or too late")
            if asked is None:
                raise WireError(f"no request to {speaker!r} is open")
            if seal.number != asked.number:
                raise WireError(f"it answers request {seal.number}, the open one is {asked.number}")
            if not verify(self._keys[speaker], reply_statement(asked, reply, error), seal.signature):
                raise WireError(f"its signature does not fit: not made by {speaker!r}, or altered since")
            self._answered[speaker] = seal.number
            del self._open[speaker]


class Reader:
    """The client's side: opens requests of the one server, in rising order, and seals the replies."""

    def __init__(self, federation: str, client: str, key: ec.EllipticCurvePrivateKey, server_key: bytes) -> None:
        self._federation, self._client = federation, client
        self._key, self._server_key = key, load_public(server_key)

    def open(self, kind: str, request: Said, raw: bytes | None) -> tuple[Statement, bytes]:
        """What the server says with a request, and its signature. Raises WireError with the reason."""
        seal = Seal.read(raw)
        if seal.name != self._client:
            raise WireError(f"it is meant for client {seal.name!r}, this is {self._client!r}")
        statement = request_statement(self._federation, seal, kind, request)
        if not verify(self._server_key, statement, seal.signature):
            raise WireError("its signature does not fit: not made by the server of the join file, or altered since")
        return statement, seal.signature

    def seal(self, asked: Statement, reply: Said, error: str | None) -> bytes:
        """For the reply to a request that was opened."""
        signature = sign(self._key, reply_statement(asked, reply, error))
        return Seal(asked.number, asked.run, signature, self._client).to_bytes()
