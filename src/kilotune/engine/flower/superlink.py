"""A SuperLink inside this process: Flower's own Fleet API, state and node authentication, on one port.

This file and fleet.py hold all contact with Flower's internal API (tests/engine/flower/test_flower_contract.py).
What differs from `flower-superlink`: only the Fleet calls a resident client needs are answered (no control, no runtime,
no app bundles); only enrolled keys get in; a poll is held until there is something to fetch; messages carry their
content inline instead of as objects to be fetched one by one; and TLS bytes are counted by the relay in front.
"""

import asyncio
import contextlib
import logging
import queue
import secrets
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import uvicorn
from flwr.app import Message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate import InMemoryLinkState
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.superlink.grid.inmemory_grid import InMemoryGrid
from flwr.superlink.main import create_app

from kilotune.core.errors import FederationError
from kilotune.engine.flower.keys import ServerKeys, key_id
from kilotune.engine.flower.messages import Request, encode_request
from kilotune.engine.flower.traffic import Meter, Relay, Wire, listen

PULL, PUSH = "/v1/fleet/pull-messages", "/v1/fleet/push-messages"
JOIN, LEAVE = "/v1/fleet/activate-node", "/v1/fleet/deactivate-node"
CALLS = {PULL, PUSH, JOIN, LEAVE, "/v1/fleet/send-node-heartbeat"}
KEY_HEADER = FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode()
HOLD_S = 15.0  # below the 30 s after which common proxies give up
START_S = 60.0

Event = tuple[str, str]  # ("joined" | "left" | "replied", client name)
Asgi = Callable[[Any, Any, Any], Awaitable[None]]


class ResidentState(InMemoryLinkState):
    """Flower's in-memory state that reports what happens and lets a client come back at once."""

    report: Callable[[str, int], None]

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        """A client killed and restarted is still online for Flower, which would refuse it for a minute."""
        with self.lock:
            self.deactivate_node(node_id)
            done = super().activate_node(node_id, heartbeat_interval)
        if done:
            self.report("joined", node_id)
        return done

    def get_message_ins(self, node_id: int, limit: int | None, *, run_id: int | None = None) -> list[Message]:
        """A poll is a sign of life, so a waiting client needs no heartbeats."""
        self.acknowledge_node_heartbeat(node_id, HEARTBEAT_DEFAULT_INTERVAL)
        return super().get_message_ins(node_id, limit, run_id=run_id)

    def store_message_res(self, message: Message) -> str | None:
        """Report a reply; a late one (its request is gone) is dropped by Flower."""
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


class Gate:
    """The outermost ASGI layer: who and what may enter, how long a poll is held, whose bytes these are."""

    def __init__(
        self,
        app: Asgi,
        clients: dict[str, bytes],
        meter: Meter,
        waiting: Callable[[str], bool],
        pushed: Callable[[str], None],
    ) -> None:
        self._app, self._meter, self._waiting, self._pushed = app, meter, waiting, pushed
        self._keys = {key_id(key).encode(): (name, b64encode(key)) for name, key in clients.items()}
        self._bells: dict[str, set[asyncio.Event]] = {}
        self._closing = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one HTTP request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = self._identify(scope)
        wire = self._meter.wires.get(scope["client"][1])
        if wire is None or name is None or scope["path"] not in CALLS:
            await _refuse(send, b'{"detail": "not enrolled in this federation"}')
            return
        if scope["path"] == PULL:
            await self._hold(name, wire)
            if not wire.open:
                return  # a message handed to a dead connection would be lost
        useful = scope["path"] == PUSH

        async def watch(message: Any) -> None:
            nonlocal useful
            if message["type"] == "http.response.start":
                size = dict(message["headers"]).get(b"content-length", b"0")
                ok = message["status"] == 200
                useful = ok and (useful or (scope["path"] == PULL and size != b"0"))
                self._meter.settle(wire, name, useful)
            await send(message)

        await self._app(scope, receive, watch)
        if scope["path"] == PUSH:
            self._pushed(name)  # now that its bytes are booked
        elif scope["path"] == LEAVE:
            self.ring(name)

    def ring(self, name: str | None = None) -> None:
        """Wake the held polls of one client, or of all."""
        for owner, bells in self._bells.items():
            if name in (None, owner):
                for bell in bells:
                    bell.set()

    def close(self) -> None:
        """Hold no poll any more."""
        self._closing = True
        self.ring()

    async def _hold(self, name: str, wire: Wire) -> None:
        bells = self._bells.setdefault(name, set())
        bell = asyncio.Event()
        bells.add(bell)  # before looking, so that no message can slip in between
        try:
            if wire.open and not self._closing and not self._waiting(name):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(bell.wait(), HOLD_S)
        finally:
            bells.discard(bell)

    def _identify(self, scope: Any) -> str | None:
        """Whose key this is; Flower's layer gets the whole key and checks that the signature belongs to it."""
        for index, (header, value) in enumerate(scope["headers"]):
            if header == KEY_HEADER and value in self._keys:
                name, key = self._keys[value]
                scope["headers"][index] = (header, key)
                return name
        return None


class SuperLink:
    """The running SuperLink. Its event loop lives in a thread; `events` tells what happens."""

    def __init__(self, keys: ServerKeys, listener: socket.socket) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._app, self._state, self.grid = _flower()
        self._state.report = self._report
        self.nodes = {
            name: self._state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, HEARTBEAT_DEFAULT_INTERVAL)
            for name, key in keys.clients.items()
        }
        self._names = {node_id: name for name, node_id in self.nodes.items()}
        self.joins = dict.fromkeys(self.nodes, 0)  # how often each client has joined
        self._outbox: dict[str, Message] = {}
        self._answered: set[str] = set()  # replies stored whose bytes are not booked yet
        self.meter = Meter(self._left)
        self._gate = Gate(self._app, keys.clients, self.meter, self._has_mail, self._pushed)
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

    def send(self, name: str, request: Request) -> str | None:
        """Put a request where the client's next poll finds it; None if the client has never joined."""
        message_id = secrets.token_hex(32)
        message = encode_request(request, self.grid.run.run_id, self.nodes[name], message_id, time.time())
        self._outbox[name] = message
        if not list(self.grid.push_messages([message])):
            del self._outbox[name]
            return None
        self._loop.call_soon_threadsafe(self._gate.ring, name)
        return message_id

    def withdraw(self, name: str) -> None:
        """Take an unanswered request back."""
        message = self._outbox.pop(name, None)
        if message is not None:
            self.grid.drop([message.metadata.message_id])

    def delivered(self, name: str) -> bool:
        """Whether the client has fetched the request last sent to it."""
        return name in self._outbox and self._outbox[name].metadata.delivered_at != ""

    def online(self) -> set[str]:
        """Clients that are active for Flower and hold a connection."""
        active = {node.node_id for node in self._state.get_node_info(statuses=[NodeStatus.ONLINE])}
        return {self._names[node_id] for node_id in active} & self.meter.present()

    def _has_mail(self, name: str) -> bool:
        message = self._outbox.get(name)
        return message is not None and message.metadata.delivered_at == ""

    def _report(self, what: str, node_id: int) -> None:
        name = self._names[node_id]
        if what == "joined":
            self.joins[name] += 1
            self.events.put((what, name))
        else:
            self._answered.add(name)

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
        tls = {} if self._keys.insecure else {"ssl_keyfile": self._keys.key, "ssl_certfile": self._keys.certificate}
        return uvicorn.Config(
            self._gate,
            log_config=None,
            log_level=logging.CRITICAL,
            access_log=False,
            proxy_headers=False,  # a client could pretend to be another connection
            server_header=False,
            date_header=False,
            ws="none",
            timeout_keep_alive=3600,  # a client may train for long between two requests
            timeout_graceful_shutdown=1,
            **tls,
        )


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


async def _refuse(send: Any, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})
