"""Bytes that really crossed each client's socket: TLS, headers and retries included; TCP/IP headers are not.

A relay in the server's own process accepts the clients' TCP connections, counts every byte in both directions and
passes it on unread to the SuperLink on loopback, which ends the TLS. The SuperLink says afterwards which client and
which kind of request a stretch of bytes was, found by the port the relay used.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

CHUNK = 1 << 16
ENTER_S = 60.0  # within which a connection has to prove who it is; a handshake over 5 kbit/s takes 10 s
STRANGERS = 256  # connections at a time that have not proved it
PER_CLIENT = 4  # connections at a time: one that works, one that beats, two that died unnoticed


@dataclass(frozen=True)
class Traffic:
    """Totals of one client. Idle: handshakes, joins, polls that found nothing, heartbeats, refused requests."""

    up_bytes: int = 0
    down_bytes: int = 0
    idle_up_bytes: int = 0
    idle_down_bytes: int = 0

    def __sub__(self, earlier: "Traffic") -> "Traffic":
        """What was added since `earlier`."""
        return Traffic(
            self.up_bytes - earlier.up_bytes,
            self.down_bytes - earlier.down_bytes,
            self.idle_up_bytes - earlier.idle_up_bytes,
            self.idle_down_bytes - earlier.idle_down_bytes,
        )


class Wire:
    """One TCP connection. Bytes wait in `up`/`down` until the request they belong to is named."""

    def __init__(self, hang_up: Callable[[], None] = lambda: None) -> None:
        self.open = True
        self.hang_up = hang_up
        self.owner: str | None = None  # who it proved to be
        self.name: str | None = None  # who was answered
        self.up = self.down = 0
        self._target: tuple[str, bool] | None = None  # (client, useful) of the request being answered


class Meter:
    """Connections by the relay's port, and totals by client. Used from the server's event loop only."""

    def __init__(self, on_left: Callable[[str], None]) -> None:
        self.wires: dict[int, Wire] = {}
        self._totals: dict[str, list[int]] = {}  # name -> [up, down, idle up, idle down]
        self._on_left = on_left

    def sent(self, wire: Wire, size: int) -> None:
        """Bytes from the client: after an answer they begin the next request."""
        wire._target = None
        wire.up += size

    def received(self, wire: Wire, size: int) -> None:
        """Bytes to the client."""
        if wire._target is None:
            wire.down += size
        else:
            self._add(*wire._target, 0, size)

    def settle(self, wire: Wire, name: str, useful: bool) -> None:
        """Name the request whose answer is about to be written."""
        wire.name = name
        wire._target = (name, useful)
        self._add(name, useful, wire.up, wire.down)
        wire.up = wire.down = 0

    def enter(self, wire: Wire, name: str) -> None:
        """The connection has proved whose it is. Of too many, the oldest goes."""
        if wire.owner is None:
            wire.owner = name
            self._trim([other for other in self.wires.values() if other.owner == name], PER_CLIENT)

    def add(self, port: int, wire: Wire) -> None:
        """A new connection, of a stranger as yet."""
        self.wires[port] = wire
        self._trim([other for other in self.wires.values() if other.owner is None], STRANGERS)

    def _trim(self, wires: list[Wire], limit: int) -> None:
        for old in wires[: max(0, len(wires) - limit)]:
            old.hang_up()

    def closed(self, port: int) -> None:
        """Forget a connection; its unnamed bytes were idle ones."""
        wire = self.wires.pop(port)
        wire.open = False
        if wire.name is not None:
            self._add(wire.name, False, wire.up, wire.down)
            if wire.name not in self.present():
                self._on_left(wire.name)

    def present(self) -> set[str]:
        """Clients with an open connection."""
        return {wire.name for wire in list(self.wires.values()) if wire.name is not None}

    def totals(self) -> dict[str, Traffic]:
        """Totals so far, by client."""
        return {name: Traffic(*counts) for name, counts in sorted(self._totals.items())}

    def _add(self, name: str, useful: bool, up: int, down: int) -> None:
        counts = self._totals.setdefault(name, [0, 0, 0, 0])
        counts[0 if useful else 2] += up
        counts[1 if useful else 3] += down


class Relay:
    """Passes TCP connections on to `port` on loopback and counts them."""

    def __init__(self, meter: Meter, port: int) -> None:
        self._meter, self._port = meter, port

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one accepted connection until either side closes it."""
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            writer.close()
            return
        port = inner_writer.get_extra_info("sockname")[1]
        wire = Wire(writer.transport.abort)
        self._meter.add(port, wire)
        patience = asyncio.get_running_loop().call_later(ENTER_S, dismiss, wire)
        inward = asyncio.create_task(_pump(reader, inner_writer, lambda size: self._meter.sent(wire, size)))
        outward = asyncio.create_task(_pump(inner_reader, writer, lambda size: self._meter.received(wire, size)))
        try:
            await asyncio.wait({inward, outward}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            patience.cancel()
            inward.cancel()
            outward.cancel()
            for end in (writer, inner_writer):
                end.close()
            self._meter.closed(port)


def dismiss(wire: Wire) -> None:
    """Close a connection that has not proved whose it is."""
    if wire.owner is None:
        wire.hang_up()


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket. asyncio turns Nagle's delay off only where the protocol is named, as here."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # elsewhere the option would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: Callable[[int], None]) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK):
            count(len(data))  # before it is passed on, so that the answer can never overtake the count
            writer.write(data)
            await writer.drain()
