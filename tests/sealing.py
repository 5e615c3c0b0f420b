"""A federation's messages without a network: server desk, client posts, and everything that lies between them."""

from pathlib import Path

from flwr.app import Message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from kilotune.engine.flower.client import Post
from kilotune.engine.flower.keys import init_server, read_join_file
from kilotune.engine.flower.limits import Limits
from kilotune.engine.flower.messages import (
    Handler,
    Reply,
    Request,
    attach,
    decode_reply,
    encode_request,
    seal_of,
)
from kilotune.engine.flower.seals import Desk
from kilotune.engine.rounds.identity import Heads
from kilotune.engine.rounds.ledger import Contribution, Header, Ledger

RUN = "0f" * 16
HEADER = Header("tiny", "aa" * 32, "0" * 16, 1, {})
ROOT = 5


def to_wire(message: Message) -> bytes:
    if not message.metadata.message_id:
        message.metadata.__dict__["_message_id"] = "reply"
    return message_to_proto(message).SerializeToString()


def from_wire(raw: bytes) -> Message:
    return message_from_proto(ProtoMessage.FromString(raw))


class Ends:
    """One server, its clients, and what each client was handed (`handled`) or said (`events`)."""

    def __init__(self, folder: Path, *names: str, run: str = RUN, handlers: dict[str, Handler] | None = None) -> None:
        self.keys = init_server(folder / "keys", "127.0.0.1", 8443, list(names))
        self.folder = folder
        self.desk = self.server(1, run)
        self.handled: list[tuple[str, Request]] = []
        self.events: list[str] = []
        self._handlers = handlers or {}
        self.posts: dict[str, Post] = {}
        self.heads: dict[str, Heads] = {}
        for name in names:
            self.start(name)

    def server(self, start: int, run: str = RUN) -> Desk:
        """A desk of this federation, as after a restart or for another run."""
        return Desk(self.keys.federation, run, start, self.keys.signing_key(), self.keys.clients)

    def start(self, name: str) -> None:
        """The client, with what its folder remembers."""
        join = read_join_file(self.keys.join_path(name))
        self.heads[name] = Heads(join.federation, name, join.server_key, self.folder / name)

        def handle(request: Request) -> Reply:
            self.handled.append((name, request))
            if name in self._handlers:
                return self._handlers[name](request)
            return Reply({"round": 0, "head": ""}, tuple(payload[::-1] for payload in request.payloads))

        self.posts[name] = Post(join, self.heads[name], handle, Limits(), self.events.append)

    def request(self, name: str, request: Request, desk: Desk | None = None) -> bytes:
        """What the server puts on the wire."""
        message = encode_request(request, 7, 9, "ab" * 32, 1.8e9)
        return to_wire(attach(message, (desk or self.desk).seal(name, request.kind, request)))

    def reply(self, name: str, raw: bytes, sent: bool = True) -> bytes:
        """What the client puts on the wire; `sent`: and knows to have arrived."""
        answer = self.posts[name].answer(from_wire(raw))
        if sent:
            self.posts[name].sent(answer)
        if answer.fatal is not None:
            raise answer.fatal
        return to_wire(answer.message)

    def admit(self, speaker: str, raw: bytes, desk: Desk | None = None) -> Reply:
        """What the server makes of it. Raises WireError."""
        message = from_wire(raw)
        reply = decode_reply(message)
        (desk or self.desk).admit(speaker, reply, reply.error, seal_of(message))
        return reply

    def round_trip(self, name: str, request: Request, desk: Desk | None = None) -> Reply:
        return self.admit(name, self.reply(name, self.request(name, request, desk)), desk)


def history(*payloads: bytes) -> Ledger:
    """A ledger of these rounds."""
    ledger = Ledger(HEADER)
    for payload in payloads:
        ledger.append(ROOT, payload, (Contribution("anna", 1, 1.0, "00" * 32),))
    return ledger


class Follower:
    """A client that recomputes the chain, as a worker does, and holds nothing else."""

    def __init__(self) -> None:
        self.round, self.head = 0, HEADER.hash
        self.heads = None

    def __call__(self, request: Request) -> Reply:
        number = int(request.body["first"]) - 1
        head = self.head if number else HEADER.hash
        for part in request.payloads:
            number += 1
            head = self.heads.follow(number, head, ROOT, part)
        if head != request.body["head"]:
            return Reply(error="histories differ")
        self.round, self.head = number, head
        return Reply({"round": self.round, "head": self.head})


def federation(folder: Path, *names: str) -> Ends:
    """Clients that follow whatever history they are shown."""
    followers = {name: Follower() for name in names}
    ends = Ends(folder, *names, handlers=followers)
    for name, follower in followers.items():
        follower.heads = ends.heads[name]
    ends.followers = followers
    return ends


def ask(ledger: Ledger, first: int) -> Request:
    """For the next round of this ledger, with the rounds from `first` on."""
    parts = tuple(ledger.part(number) for number in range(first, len(ledger) + 1))
    facts = {"round": len(ledger) + 1, "rounds": len(ledger), "head": ledger.head, "first": first}
    return Request("train", facts, parts)


def follow(ends: Ends, name: str, ledger: Ledger) -> Reply:
    """Show a client what it lacks of a ledger."""
    return ends.round_trip(name, ask(ledger, ends.followers[name].round + 1))
