"""In-process federation: the same Flower messages through a Grid whose nodes are functions. No sockets, no threads."""

import secrets
import time
from collections.abc import Iterable, Iterator
from typing import NoReturn

from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid

from kilotune.engine.flower.messages import (
    Handler,
    Reply,
    Request,
    Traffic,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)


class LocalGrid(Grid):
    """A Flower Grid that answers a message at the moment its reply is pulled, one at a time."""

    def __init__(self, handlers: dict[int, Handler]) -> None:
        self._handlers = handlers
        self._waiting: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        """The ids given at construction, in order."""
        return list(self._handlers)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep the messages until their replies are pulled."""
        batch = {message.metadata.message_id: message for message in messages}
        self._waiting.update(batch)
        return list(batch)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the handlers of these messages, in the order given, and return their replies."""
        return [self._answer(self._waiting.pop(i)) for i in message_ids if i in self._waiting]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push and pull at once."""
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        handler = self._handlers[message.metadata.dst_node_id]
        return encode_reply(handler(decode_request(message)), message)

    def set_run(self, run: object) -> None:
        """There is one run, number 0."""

    @property
    def run(self) -> NoReturn:
        """Not a part of the in-process grid."""
        raise NotImplementedError("the in-process grid has no run record")

    def create_message(self, *args: object, **kwargs: object) -> NoReturn:
        """Deprecated in Flower; messages come from engine.flower.messages."""
        raise NotImplementedError("make messages with kilotune.engine.flower.messages")


class LocalExchange:
    """An Exchange over handlers in this process, called in order of client name."""

    def __init__(self, handlers: dict[str, Handler]) -> None:
        self._ids = {name: index for index, name in enumerate(sorted(handlers), start=SUPERLINK_NODE_ID + 1)}
        self._grid = LocalGrid({node_id: handlers[name] for name, node_id in self._ids.items()})

    def roster(self) -> list[str]:
        """All clients: nothing can be out of reach here."""
        return list(self._ids)

    def exchange(
        self, requests: dict[str, Request], deadline_s: float | None = None, keep: bool = False
    ) -> Iterator[tuple[str, Reply]]:
        """Answer the requests one after another.

        The deadline is for clients that can be away: here it would drop the last ones on a slow machine, and a
        simulated run must depend on recipe, data and base alone. For the same reason an exception of a handler is
        a bug that ends the run; what may go wrong comes back as Reply.error.
        """
        for name in sorted(requests):
            message = encode_request(requests[name], 0, self._ids[name], secrets.token_hex(32), time.time())
            self._grid.push_messages([message])
            (reply,) = self._grid.pull_messages([message.metadata.message_id])
            yield name, decode_reply(reply)

    def kept(self) -> set[str]:
        """Nobody is ever late."""
        return set()

    def give_up(self, clients: list[str]) -> None:
        """There is nothing to take back."""

    def traffic(self) -> dict[str, Traffic] | None:
        """Nothing crosses a socket."""
        return None

    def close(self) -> None:
        """Nothing to stop."""
