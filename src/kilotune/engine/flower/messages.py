"""What server and clients say to each other, and the one place where it becomes a Flower message.

Wire: one ConfigRecord named "kilotune" with the keys `kind` (requests) or `error` (failed replies), `count`
(number of payloads), `b.NAME` (facts), `p.N` (payloads) and, between machines, `seal` (seals.py). Flower cannot count
empty bytes or strings, so an empty payload is left out (its index is below `count`) and empty facts are named in
`blank`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import ConfigRecord, Message, Metadata, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID

from kilotune.core.errors import WireError
from kilotune.engine.flower.traffic import Traffic

Fact = str | int | float | bool
Facts = dict[str, Fact]

RECORD = "kilotune"
TYPES = {
    "hello": "query.hello",
    "train": "train",
    "evaluate": "evaluate",
    "finish": "query.finish",
    "secure.keys": "query.secure_keys",
    "secure.shares": "query.secure_shares",
    "secure.unmask": "query.secure_unmask",
}
TTL_S = 7 * 24 * 3600.0  # deadlines are ours; Flower's time to live only has to outlast them
MAX_COUNT = 1 << 16
MAX_FACTS = 64
MAX_TEXT = 4096  # characters of a fact, its name included
MAX_ERROR = 1000
SEAL = "seal"


@dataclass(frozen=True)
class Request:
    """From server to client: what to do, small facts, and 0 to n binary parts."""

    kind: str
    body: Facts = field(default_factory=dict)
    payloads: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Reply:
    """From client to server; `error` is the one line a failed client has to say."""

    body: Facts = field(default_factory=dict)
    payloads: tuple[bytes, ...] = ()
    error: str | None = None

    def __post_init__(self) -> None:
        if self.error is not None:
            text = self.error[:MAX_ERROR].encode(errors="replace").decode()  # a path may hold what is no text
            object.__setattr__(self, "error", text or "unnamed error")


Handler = Callable[[Request], Reply]


class Exchange(Protocol):
    """The server's view of its clients, the same for every way to run."""

    def roster(self) -> list[str]:
        """Names of the clients reachable now, sorted."""

    def exchange(
        self, requests: dict[str, Request], deadline_s: float | None = None, keep: bool = False
    ) -> Iterator[tuple[str, Reply]]:
        """Send every request, then yield each reply as it arrives.

        A client that fails yields Reply(error=...); one that vanishes or misses the deadline does not appear: when
        the iterator ends or is closed, its request is taken back. `keep`: it stays open instead, its reply may come
        from the next exchange that keeps, and until then the client may be sent nothing else.
        """

    def kept(self) -> set[str]:
        """Clients whose requests are open still."""

    def give_up(self, clients: list[str]) -> None:
        """Take the requests that were kept open for these clients back."""

    def traffic(self) -> dict[str, Traffic] | None:
        """Bytes that crossed each client's socket so far; None where there is no socket."""

    def close(self) -> None:
        """Stop. Clients that were not told to finish wait for the server to come back."""


def encode_request(request: Request, run_id: int, node_id: int, message_id: str, created_at: float) -> Message:
    """Wrap a request for one node of a run."""
    if request.kind not in TYPES:
        raise WireError(f"request.kind: got {request.kind!r}, expected one of {', '.join(TYPES)}.")
    record = _pack(request.body, request.payloads)
    record["kind"] = request.kind
    metadata = Metadata(
        run_id=run_id,
        message_id=message_id,
        src_node_id=SUPERLINK_NODE_ID,
        dst_node_id=node_id,
        reply_to_message_id="",
        group_id="",
        created_at=created_at,
        ttl=TTL_S,
        message_type=TYPES[request.kind],
    )
    return Message(metadata=metadata, content=RecordDict({RECORD: record}))


def decode_request(message: Message) -> Request:
    """Unwrap; raises WireError on anything but the layout of this module."""
    record = _record(message)
    kind = record.pop("kind", None)
    if not isinstance(kind, str) or TYPES.get(kind) != message.metadata.message_type:
        raise WireError(f"message: kind {kind!r} in a message of type {message.metadata.message_type!r}.")
    body, payloads = _unpack(record)
    return Request(kind, body, payloads)


def encode_reply(reply: Reply, request: Message) -> Message:
    """Wrap the answer to `request`, which may have lost its content since."""
    record = _pack(reply.body, reply.payloads)
    if reply.error is not None:
        record["error"] = reply.error
    return Message(RecordDict({RECORD: record}), reply_to=request)


def decode_reply(message: Message) -> Reply:
    """Unwrap; an error Flower itself made becomes Reply.error."""
    if message.has_error():
        return Reply(error=message.error.reason or f"Flower error {message.error.code}")
    record = _record(message)
    error = record.pop("error", None)
    if error is not None and not isinstance(error, str):
        raise WireError(f"message: error is a {type(error).__name__}, expected text.")
    body, payloads = _unpack(record)
    return Reply(body, payloads, error)


def attach(message: Message, seal: bytes) -> Message:
    """The message with a seal over what it says."""
    record = message.content[RECORD]
    assert isinstance(record, ConfigRecord), "messages of this module hold one"
    record[SEAL] = seal
    return message


def seal_of(message: Message) -> bytes | None:
    """The seal of a message from outside; None when it has none. Raises WireError on any other layout."""
    seal = _record(message).get(SEAL)
    if seal is not None and not isinstance(seal, bytes):
        raise WireError(f"message: seal is a {type(seal).__name__}, expected bytes.")
    return seal


def _pack(body: Facts, payloads: tuple[bytes, ...]) -> ConfigRecord:
    record = ConfigRecord({"count": len(payloads)})
    blank = []
    for name, value in body.items():
        if not isinstance(name, str) or not name or "\n" in name:
            raise WireError(f"body: got the name {name!r}, expected text of one line.")
        if not isinstance(value, str | int | float):
            raise WireError(f"body.{name}: got a {type(value).__name__}, expected str, int, float or bool.")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise WireError(f"body.{name}: got {value}, expected an integer of 64 bits.")
        if value == "":
            blank.append(name)
        else:
            record[f"b.{name}"] = value
    if blank:
        record["blank"] = "\n".join(blank)
    for index, payload in enumerate(payloads):
        if not isinstance(payload, bytes):
            raise WireError(f"payloads[{index}]: got a {type(payload).__name__}, expected bytes.")
        if payload:
            record[f"p.{index}"] = payload
    return record


def _index(name: str) -> int:
    """The index of a payload as this module writes it; any other text is beyond every count."""
    short = len(name) <= len(str(MAX_COUNT)) and name.isascii() and name.isdigit()
    return int(name) if short and name == str(int(name)) else MAX_COUNT


def _record(message: Message) -> dict[str, object]:
    if not message.has_content() or list(message.content) != [RECORD]:
        found = list(message.content) if message.has_content() else "no content"
        raise WireError(f"message: got {found}, expected one record named {RECORD!r}.")
    record = message.content[RECORD]
    if not isinstance(record, ConfigRecord):
        raise WireError(f"message: record {RECORD!r} is a {type(record).__name__}, expected a ConfigRecord.")
    return dict(record)


def _unpack(record: dict[str, object]) -> tuple[Facts, tuple[bytes, ...]]:
    record.pop(SEAL, None)
    count, blank = record.pop("count", None), record.pop("blank", None)
    if type(count) is not int or not 0 <= count <= MAX_COUNT:
        raise WireError(f"message: count is {count!r}, expected an integer from 0 to {MAX_COUNT}.")
    if blank is not None and not isinstance(blank, str):
        raise WireError(f"message: blank is a {type(blank).__name__}, expected text.")
    if len(record) > MAX_FACTS + count or (blank and blank.count("\n") >= MAX_FACTS):
        raise WireError(f"message: {len(record)} entries for {count} payloads, expected {MAX_FACTS} facts at most.")
    body: Facts = dict.fromkeys(blank.split("\n"), "") if blank else {}
    payloads = [b""] * count
    for key, value in record.items():
        prefix, name = key[:2], key[2:]
        if len(key) + (len(value) if isinstance(value, str) else 0) > MAX_TEXT:
            raise WireError(f"message: entry {key[:40]!r} is longer than {MAX_TEXT} characters.")
        if prefix == "b." and isinstance(value, str | int | float) and name not in body:
            body[name] = value
        elif prefix == "p." and isinstance(value, bytes) and _index(name) < count:
            payloads[int(name)] = value
        else:
            raise WireError(f"message: unexpected entry {key!r} ({type(value).__name__}).")
    return body, tuple(payloads)
