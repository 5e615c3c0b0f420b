"""Who and what may enter the SuperLink, how long a poll is held, and whose bytes a request was.

Flower's own application answers many more calls (control, runtime, app bundles, documentation), most of them without
asking who is there; a federation whose clients run only their own code needs five.
"""

import asyncio
import contextlib
from base64 import b64encode
from collections.abc import Awaitable, Callable
from typing import Any

from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

from kilotune.engine.flower.keys import key_id
from kilotune.engine.flower.traffic import Meter, Wire

Asgi = Callable[[Any, Any, Any], Awaitable[None]]

PULL, PUSH = "/v1/fleet/pull-messages", "/v1/fleet/push-messages"
JOIN, LEAVE = "/v1/fleet/activate-node", "/v1/fleet/deactivate-node"
CALLS = {PULL, PUSH, JOIN, LEAVE, "/v1/fleet/send-node-heartbeat"}
KEY_HEADER = FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode()
HOLD_S = 15.0  # below the 30 s after which common proxies give up


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


async def _refuse(send: Any, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})
