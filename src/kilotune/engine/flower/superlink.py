"""A SuperLink inside this process: Flower's own Fleet API, state and node authentication, on one port.

This file and fleet.py hold all contact with Flower's internal API (tests/engine/flower/test_flower_contract.py).
What differs from `flower-superlink`: only the Fleet calls a resident client needs are answered (no control, no runtime,
no app bundles); only enrolled keys get in, with their certificate; messages are signed and a reply counts once; a poll
is held until there is something to fetch; messages carry their content inline instead of as objects to be fetched one
by one; and TLS bytes are counted by the relay in front.
"""

import asyncio
import logging
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable

import uvicorn
from flwr.app import Message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate import InMemoryLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.object_store import ObjectStore
from flwr.superlink.federation import FederationManager
from flwr.superlink.grid.inmemory_grid import InMemoryGrid
from flwr.superlink.main import create_app

from kilotune.core.errors import FederationError, WireError
from kilotune.engine.flower.gate import HEADER_BYTES, Asgi, Gate, speaker
from kilotune.engine.flower.keys import ServerKeys
from kilotune.engine.flower.limits import Limits
from kilotune.engine.flower.messages import Request, attach, decode_reply, encode_request, seal_of
from kilotune.engine.flower.seals import Desk
from kilotune.engine.flower.tls import CertifiedProtocol, demand_certificates
from kilotune.engine.flower.traffic import Meter, Relay, listen

START_S = 60.0

Event = tuple[str, str]  # ("joined" | "left" | "replied" | what went wrong, client name)


class ResidentState(InMemoryLinkState):
    """Flower's in-memory state that reports what happens and lets a client come back at once."""

    report: Callable[[str, int], None]
    admit: Callable[[Message], None] = staticmethod(lambda message: None)

    def __init__(self, federation_manager: FederationManager, object_store: ObjectStore) -> None:
        super().__init__(federation_manager, object_store)
        self._left: set[int] = set()  # nodes that have not joined, or not since they left

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        """A client killed and restarted is still online for Flower, which would refuse it for a minute.

        What it had fetched and not answered is lost with its memory, so it may fetch it again.
        """
        with self.lock:
            self.deactivate_node(node_id)
            self._left.discard(node_id)
            done = super().activate_node(node_id, heartbeat_interval)
            for message_id, message in self.message_ins_store.items():
                answered = message_id in self.message_ins_id_to_message_res_id
                if message.metadata.dst_node_id == node_id and not answered:
                    message.metadata.delivered_at = ""
        if done:
            self.report("joined", node_id)
        return done

    def deactivate_node(self, node_id: int) -> bool:
        """From here on only joining again brings it back."""
        with self.lock:
            self._left.add(node_id)
            return super().deactivate_node(node_id)

    def acknowledge_node_heartbeat(self, node_id: int, heartbeat_interval: float) -> bool:
        """A heartbeat, or a poll, that a client sent before it left may come after that."""
        with self.lock:
            return node_id not in self._left and super().acknowledge_node_heartbeat(node_id, heartbeat_interval)

    def add(self, public_key: bytes) -> int:
        """A node for an enrolled key, at first offline: messages may wait for it before it has ever joined."""
        node_id = self.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public_key, HEARTBEAT_DEFAULT_INTERVAL)
        super().activate_node(node_id, HEARTBEAT_DEFAULT_INTERVAL)
        self.deactivate_node(node_id)
        return node_id

    def get_message_ins(self, node_id: int, limit: int | None, *, run_id: int | None = None) -> list[Message]:
        """A poll is a sign of life, so a waiting client needs no heartbeats. One that has left is given nothing."""
        here = self.acknowledge_node_heartbeat(node_id, HEARTBEAT_DEFAULT_INTERVAL)
        return super().get_message_ins(node_id, limit, run_id=run_id) if here else []

    def store_message_res(self, message: Message) -> str | None:
        """Report a reply; one that is refused takes nobody's place."""
        try:
            self.admit(message)
        except WireError as error:
            self.report(f"sent a reply that is refused: {error}", message.metadata.src_node_id)
            return None
        stored = super().store_message_res(message)
        if stored is not None:
            self.report("replied", message.metadata.src_node_id)
        return stored


class ResidentGrid(InMemoryGrid):
    """Flower's in-memory Grid, with ids the Fleet API accepts: nobody but the addressee can guess one."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Store messages with their content inline; ids of messages to unknown nodes are left out."""
        ids = []
        for message in messages:
            self._check_message(message)
            tree = ObjectTree(object_id=message.metadata.message_id)
            session = self.state.start_session(message.metadata.run_id)
            if self.state.store_message_and_object_tree(message, tree, session)[0]:
                ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Take replies out, and every trace of the exchange with them."""
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            self.state.object_store.delete(reply.metadata.message_id)
            self.state.object_store.delete(reply.metadata.reply_to_message_id)
        return replies

    def drop(self, message_ids: Iterable[str]) -> None:
        """Withdraw messages, answered or not."""
        for message_id in message_ids:
            self.state.delete_messages({message_id})
            self.state.object_store.delete(message_id)

    def tidy(self) -> None:
        """Forget upload sessions: contents travel inline, so none is ever completed."""
        self.state.delete_sessions_in_run(self.run.run_id)


class SuperLink:
    """The running SuperLink. Its event loop lives in a thread; `events` tells what happens."""

    def __init__(self, keys: ServerKeys, listener: socket.socket, desk: Desk, limits: Limits) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.limits = limits
        self._app, self._state, self.grid = _flower()
        self._state.report, self._state.admit = self._report, self._admit
        self.nodes = {name: self._state.add(key) for name, key in keys.clients.items()}
        self._names = {node_id: name for name, node_id in self.nodes.items()}
        self._desk = desk
        self._outbox: dict[str, Message] = {}
        self._answered: set[str] = set()  # replies stored whose bytes are not booked yet
        self.meter = Meter(self._left)
        self._gate = Gate(
            self._app,
            keys.clients,
            self.meter,
            self._has_mail,
            self._pushed,
            lambda name: self.limits.push(self._desk.kind(name)),
            certified=not keys.insecure,
        )
        self._listener, self._keys = listener, keys
        self._ready: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run, name="superlink", daemon=True)

    def start(self) -> None:
        """Return once clients can connect."""
        self._thread.start()
        error = self._ready.get(timeout=START_S)
        if error is not None:
            raise FederationError(f"the SuperLink did not start: {error}")

    def stop(self) -> None:
        """Close every connection and end the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()

    def send(self, name: str, request: Request) -> None:
        """Put a request where the client's next poll finds it."""
        message_id = secrets.token_hex(32)
        message = encode_request(request, self.grid.run.run_id, self.nodes[name], message_id, time.time())
        attach(message, self._desk.seal(name, request.kind, request))
        if not list(self.grid.push_messages([message])):
            raise FederationError(f"the SuperLink did not take a message for {name}.")
        self._outbox[name] = message
        self._loop.call_soon_threadsafe(self._gate.ring, name)

    def take(self, name: str) -> list[Message]:
        """The reply to the request last sent, if there is one; its request is withdrawn."""
        message = self._outbox.get(name)
        replies = list(self.grid.pull_messages([message.metadata.message_id])) if message else []
        if replies:
            self.withdraw(name)
        return replies

    def withdraw(self, name: str) -> None:
        """Take an unanswered request back."""
        self._desk.withdraw(name)
        message = self._outbox.pop(name, None)
        if message is not None:
            self.grid.drop([message.metadata.message_id])

    def online(self) -> set[str]:
        """Clients that are active for Flower and hold a connection."""
        active = {node.node_id for node in self._state.get_node_info(statuses=[NodeStatus.ONLINE])}
        return {self._names[node_id] for node_id in active} & self.meter.present()

    def _has_mail(self, name: str) -> bool:
        message = self._outbox.get(name)
        return message is not None and message.metadata.delivered_at == ""

    def _admit(self, message: Message) -> None:
        """Before Flower looks at a reply: it is small enough, and of the client that brings it. Raises WireError."""
        name = speaker.get()
        if message.metadata.src_node_id != self.nodes[name]:
            raise WireError(f"client {name!r} brought it in the name of another")
        kind, reply = self._desk.kind(name), decode_reply(message)
        limit = self.limits.other if kind is None else self.limits.reply(kind)
        if (size := sum(map(len, reply.payloads))) > limit:
            raise WireError(f"it has {size} bytes of payload, the recipe needs {limit} at most")
        self._desk.admit(name, reply, reply.error, seal_of(message))

    def _report(self, what: str, node_id: int) -> None:
        name = self._names.get(node_id, "a client")
        if what == "replied":
            self._answered.add(name)
        else:
            self.events.put((what, name))

    def _pushed(self, name: str) -> None:
        if name in self._answered:
            self._answered.remove(name)
            self.events.put(("replied", name))

    def _left(self, name: str) -> None:
        self._gate.ring(name)
        self.events.put(("left", name))

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._ready.put(error)

    async def _serve(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        inner = listen("127.0.0.1", 0)
        server = uvicorn.Server(self._config())
        serving = asyncio.create_task(server.serve(sockets=[inner]))
        while not server.started:
            if serving.done():
                raise RuntimeError(serving.exception() or "the web server ended")
            await asyncio.sleep(0.01)
        relay = Relay(self.meter, inner.getsockname()[1])
        outer = await asyncio.start_server(relay.connect, sock=self._listener)
        self._ready.put(None)
        await self._stopping.wait()
        outer.close()
        self._gate.close()
        server.should_exit = True
        await serving

    def _config(self) -> uvicorn.Config:
        config = uvicorn.Config(
            self._gate,
            http=CertifiedProtocol,
            h11_max_incomplete_event_size=2 * HEADER_BYTES,
            log_config=None,
            log_level=logging.CRITICAL,
            access_log=False,
            proxy_headers=False,  # a client could pretend to be another connection
            server_header=False,
            date_header=False,
            ws="none",
            timeout_keep_alive=3600,  # a client may train for long between two requests
            timeout_graceful_shutdown=1,
        )
        if not self._keys.insecure:
            demand_certificates(config, self._keys)
        return config


def _flower() -> tuple[Asgi, ResidentState, ResidentGrid]:
    """Flower's SuperLink application over our state, with one run that never ends and ships no code."""
    app = create_app()
    factory = app.state.linkstate_factory
    state = ResidentState(factory.federation_manager, factory.objectstore_factory.store())
    factory.state_instance = state
    app.state.enable_supernode_auth = True  # no self-registration: nodes are made from the enrolled keys
    run_id = state.create_run(
        None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, primary_task_type=TaskType.SERVER_APP
    )
    (run,) = state.get_run_info(run_ids=[run_id])
    state.claim_task(run.primary_task_id)
    state.activate_task(run.primary_task_id)
    with state.lock_task_store:  # the token is what expires when no ServerApp process reports; there is none
        state.task_token_store.clear()
        state.task_token_to_task_id.clear()
    grid = ResidentGrid(factory)
    grid.set_run(run)
    return app, state, grid
