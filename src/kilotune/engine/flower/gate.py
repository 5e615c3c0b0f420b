"""Who and what may enter the SuperLink, how long a poll is held, and whose bytes a request was.

Flower's own application answers many more calls (control, runtime, app bundles, documentation), most of them without
asking who is there; a federation whose clients run only their own code needs five, and `kilotune doctor` a sixth,
which is ours. Size, rate and identity are checked here, before any layer below reads the body.
"""

import asyncio
import contextlib
import json
import time
from base64 import b64encode
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import Any

from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

from kilotune.engine.flower.keys import key_id
from kilotune.engine.flower.tls import CERTIFICATE
from kilotune.engine.flower.traffic import Meter, Wire
from kilotune.engine.versions import versions

Asgi = Callable[[Any, Any, Any], Awaitable[None]]

PULL, PUSH = "/v1/fleet/pull-messages", "/v1/fleet/push-messages"
JOIN, LEAVE = "/v1/fleet/activate-node", "/v1/fleet/deactivate-node"
ABOUT = "/v1/kilotune/about"  # clock and versions, for `kilotune doctor`; to enrolled clients only
CALLS = {PULL, PUSH, JOIN, LEAVE, ABOUT, "/v1/fleet/send-node-heartbeat"}
KEY_HEADER = FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode()
HOLD_S = 15.0  # below the 30 s after which common proxies give up
SMALL = 1024  # bytes of a body without a message
HEADERS, HEADER_BYTES = 24, 4096
RATE, BURST = 50.0, 200.0  # requests of one key per second, and at once; a round without computation needs 20 a second

speaker: ContextVar[str] = ContextVar("speaker")
"""The client whose request is being answered, for the layers below."""


class RefusedRequestError(Exception):
    """(HTTP status, why)."""


class Gate:
    """The outermost ASGI layer: who and what may enter, how long a poll is held, whose bytes these are."""

    def __init__(
        self,
        app: Asgi,
        clients: Mapping[str, bytes],
        meter: Meter,
        waiting: Callable[[str], bool],
        pushed: Callable[[str], None],
        largest: Callable[[str], int],
        certified: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clients`: name -> public key (PEM). `largest`: bytes this client may push now. `certified`: a connection
        counts only with the certificate of the key it speaks for."""
        self._app, self._meter, self._waiting, self._pushed = app, meter, waiting, pushed
        self._clients, self._largest, self._certified, self._clock = dict(clients), largest, certified, clock
        self._keys = {key_id(key).encode(): (name, b64encode(key)) for name, key in clients.items()}
        self._bells: dict[str, set[asyncio.Event]] = {}
        self._budget: dict[str, tuple[float, float]] = {}  # name -> (requests left, since when)
        self._closing = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one HTTP request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            name, wire = self._enter(scope)
            limit = self._measure(scope, name)
        except RefusedRequestError as refused:
            await _refuse(send, *refused.args)
            return
        if scope["path"] == ABOUT:
            await _answer(send, 200, json.dumps({"time": time.time()} | versions()).encode())
            return
        if scope["path"] == PULL:
            await self._hold(name, wire)
            if not wire.open:
                return  # a message handed to a dead connection would be lost
        speaker.set(name)
        await self._app(scope, _counted(receive, limit), self._watched(scope["path"], name, wire, send))
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

    def _watched(self, path: str, name: str, wire: Wire, send: Any) -> Any:
        useful = path == PUSH

        async def watch(message: Any) -> None:
            nonlocal useful
            if message["type"] == "http.response.start":
                size = dict(message["headers"]).get(b"content-length", b"0")
                ok = message["status"] == 200
                useful = ok and (useful or (path == PULL and size != b"0"))
                self._meter.settle(wire, name, useful)
            await send(message)

        return watch

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

    def _enter(self, scope: Any) -> tuple[str, Wire]:
        headers = scope["headers"]
        if len(headers) > HEADERS or sum(len(name) + len(value) for name, value in headers) > HEADER_BYTES:
            raise RefusedRequestError(431, "too many headers")
        name = self._identify(scope)
        wire = self._meter.wires.get(scope["client"][1])
        if wire is None or name is None or scope["path"] not in CALLS or scope["method"] != "POST":
            raise RefusedRequestError(403, "not enrolled in this federation")
        if self._certified and scope.get("state", {}).get(CERTIFICATE) != (name, self._clients[name]):
            raise RefusedRequestError(403, "the certificate is not of this client")
        self._meter.enter(wire, name)
        left, since = self._budget.get(name, (BURST, 0.0))
        now = self._clock()
        left = min(BURST, left + RATE * (now - since))
        self._budget[name] = (max(0.0, left - 1), now)
        if left < 1:
            raise RefusedRequestError(429, "too many requests")
        return name, wire

    def _identify(self, scope: Any) -> str | None:
        """Whose key this is; Flower's layer gets the whole key and checks that the signature belongs to it."""
        places = [index for index, (header, _) in enumerate(scope["headers"]) if header == KEY_HEADER]
        if len(places) != 1 or scope["headers"][places[0]][1] not in self._keys:
            return None
        name, key = self._keys[scope["headers"][places[0]][1]]
        scope["headers"][places[0]] = (KEY_HEADER, key)
        return name

    def _measure(self, scope: Any, name: str) -> int:
        """Bytes the body may have: what it says it has, if that is allowed."""
        headers = dict(scope["headers"])
        if {b"content-encoding", b"transfer-encoding"} & set(headers):
            raise RefusedRequestError(415, "a body has to be sent as it is, with its length")
        size = headers.get(b"content-length", b"")
        twice = len(headers) != len(scope["headers"])  # each layer below may believe another one
        if twice or not (size.isdigit() and len(size) < 12):
            raise RefusedRequestError(411, "the length of the body is missing, or a header is there twice")
        limit = self._largest(name) if scope["path"] == PUSH else SMALL
        if int(size) > limit:
            raise RefusedRequestError(413, f"{int(size)} bytes, {limit} are enough")
        return int(size)


def _counted(receive: Any, limit: int) -> Any:
    """`receive` that breaks off a body longer than it said."""
    seen = 0

    async def counted() -> Any:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        return {"type": "http.disconnect"} if seen > limit else message

    return counted


async def _refuse(send: Any, status: int, why: str) -> None:
    """Answer, and close the connection: what else it may carry is not read."""
    await _answer(send, status, b'{"detail": "' + why.encode() + b'"}', (b"connection", b"close"))


async def _answer(send: Any, status: int, body: bytes, *more: tuple[bytes, bytes]) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
