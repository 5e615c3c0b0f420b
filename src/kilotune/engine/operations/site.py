"""Site: the small web application around a RunView — page, state, live events, health, metrics, and one action.

Reading is free where nobody else can reach (loopback), else it takes the token; the one action, a stop after the
current round, always does. What a browser may do with the page is said by its Content-Security-Policy: run the one
script and style it came with, by their hashes, and talk to this server.
"""

import asyncio
import base64
import hashlib
import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from functools import cache
from importlib.resources import files
from typing import Any

from kilotune import __version__
from kilotune.engine.operations.prometheus import CONTENT_TYPE, exposition
from kilotune.engine.operations.runview import RunView

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Answer = tuple[int, str, bytes]  # status, content type, body

TICK_S = 0.5  # between two looks at the state
BEAT_TICKS = 30  # of silence, then a comment that keeps proxies from closing the stream
MAX_STREAMS = 16
DISK_LOW_BYTES = 64 << 20  # less does not hold the next rounds
JSON, TEXT = "application/json", "text/plain; charset=utf-8"
HEADERS = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
)


class Site:
    """The ASGI application."""

    def __init__(
        self,
        view: RunView,
        token: str,
        stop: Callable[[], None],
        machine: Callable[[], dict[str, float]],
        *,
        open_reads: bool,
        hosts: frozenset[str] | None = None,
    ) -> None:
        """`machine` measures disk_free_bytes and peak_rss_bytes. `hosts`: names under which this site may be asked,
        so that a foreign page cannot reach it by a name of its own that leads to loopback; None: any."""
        self._view, self._stop, self._machine = view, stop, machine
        self._token, self._open_reads, self._hosts = token.encode(), open_reads, hosts
        self._streams = 0
        self._asked = self.closing = False

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        refusal = self._refusal(scope["method"], scope["path"], headers)
        if refusal is not None:
            await _send(send, *refusal)
        elif scope["path"] == "/events":
            await self._stream(receive, send)
        else:
            await _send(send, *self._answer(scope["path"]))

    # -- who may ask what -------------------------------------------------------------------------------------

    def _refusal(self, method: str, path: str, headers: dict[bytes, bytes]) -> Answer | None:
        """None when the request may be answered."""
        if self._hosts is not None and _hostname(headers.get(b"host", b"")) not in self._hosts:
            return _said(421, "ask under the name or number this page was opened for")
        expected = {"/": "GET", "/state": "GET", "/events": "GET", "/health": "GET", "/metrics": "GET", "/stop": "POST"}
        if path not in expected:
            return _said(404, "no such page")
        if method != expected[path]:
            return _said(405, f"{path} takes {expected[path]}")
        if path == "/" or (self._open_reads and path != "/stop"):  # the page itself holds no data
            return None
        given = headers.get(b"authorization", b"")
        if not given:
            return _said(401, "a token is needed: Authorization: Bearer TOKEN")
        scheme, _, token = given.partition(b" ")
        if scheme.lower() != b"bearer" or not secrets.compare_digest(token.strip(), self._token):
            return _said(403, "this is not the token")
        return None

    # -- answers ----------------------------------------------------------------------------------------------

    def _answer(self, path: str) -> Answer:
        if path == "/":
            return 200, "text/html; charset=utf-8", page()[0]
        if path == "/state":
            return 200, JSON, self._state()
        if path == "/metrics":
            return 200, CONTENT_TYPE, exposition(self._view.snapshot(), self._machine(), __version__).encode()
        if path == "/stop":
            if not self._asked:  # a second signal would end the run at once
                self._asked = True
                self._stop()
            return _said(202, "stopping after this round")
        return self._health()

    def _health(self) -> Answer:
        state, problems = self._view.snapshot(), []
        if self._view.problem:
            problems.append(f"the last round failed: {self._view.problem}")
        if self._machine()["disk_free_bytes"] < DISK_LOW_BYTES:
            problems.append("the disk is full")
        word = "failing" if problems else "ok"
        body = {"status": word, "problems": problems, "version": __version__}
        body |= {key: state[key] for key in ("phase", "round", "planned", "last_round_at")}
        return 503 if problems else 200, JSON, _json(body)

    def _state(self) -> bytes:
        about = {"machine": self._machine(), "version": __version__, "now": time.time()}
        return _json(self._view.snapshot() | about)

    async def _stream(self, receive: Receive, send: Send) -> None:
        """Server-sent events: the whole state whenever it has changed, until either side goes."""
        if self._streams >= MAX_STREAMS:
            await _send(send, *_said(503, "too many pages are open"))
            return
        self._streams += 1
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await _start(send, 200, "text/event-stream", None)
            seen, silent = -1, 0
            while not gone.done():
                last = self.closing  # before the look, so that the final state is always sent
                if (version := self._view.version) != seen:
                    seen, silent = version, 0
                    await _part(send, b"data: " + self._state() + b"\n\n")
                elif (silent := silent + 1) >= BEAT_TICKS:
                    silent = 0
                    await _part(send, b": still here\n\n")
                if last:
                    break
                await asyncio.wait({gone}, timeout=TICK_S)
            await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()
            self._streams -= 1


@cache
def page() -> tuple[bytes, bytes]:
    """The page and its Content-Security-Policy."""
    text = files("kilotune.engine.operations").joinpath("page.html").read_text(encoding="utf-8")
    hashes = {}
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        hashes[tag] = f"{tag}-src 'sha256-{digest}'"
    policy = ["default-src 'none'", hashes["script"], hashes["style"], "connect-src 'self'", "img-src data:"]
    policy += ["base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]
    return text.encode(), "; ".join(policy).encode()


def _hostname(host: bytes) -> str:
    """NAME of NAME:PORT, numbers of IPv6 without brackets."""
    text = host.decode("latin-1").lower()
    return text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]


def _said(status: int, text: str) -> Answer:
    return status, TEXT, f"{text}\n".encode()


def _json(content: Any) -> bytes:
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


async def _send(send: Send, status: int, kind: str, body: bytes) -> None:
    await _start(send, status, kind, len(body))
    await send({"type": "http.response.body", "body": body})


async def _start(send: Send, status: int, kind: str, length: int | None) -> None:
    headers = [*HEADERS, (b"content-type", kind.encode()), (b"content-security-policy", page()[1])]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    if status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="kilotune"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _part(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
