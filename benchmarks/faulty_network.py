"""A network that misbehaves: TCP links that throttle, delay, cut and stall, each a port of its own on loopback.

    with FaultyNetwork("127.0.0.1", 8443) as network:
        link = network.link(bits_per_s=5000)      # clients connect to 127.0.0.1:link.port
        link.cut()                                # every connection breaks off
        link.stall(); link.flow()                 # nothing arrives any more; it does again
        link.close(); link.open()                 # nobody answers at the other end; somebody does

Tests and benchmarks use it where no network of the kernel can be shaped. TCP itself stays whole, so a packet that is
lost shows as the delay of its repetition (`jitter_s`) and a broken path as a cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

HANDSHAKE_TURNS = 2  # client, server: from the third change of direction on it is requests and answers
LARGEST, SLICE_S = 1 << 16, 0.1  # bytes passed on at once: what the rate lets through in SLICE_S, within limits
AHEAD = 16  # pieces read ahead of what the other end takes
T = TypeVar("T")


@dataclass
class Faults:
    """What a link does to what passes; may be changed while it runs."""

    bits_per_s: float | None = None  # in each direction, over all connections of the link
    delay_s: float = 0.0
    jitter_s: float = 0.0  # up to this much more, evenly distributed
    cut_frac: float = 0.0  # chance that a connection breaks when requests turn to answers or back


class FaultyNetwork:
    """Links to one address. Their loop runs in a thread of its own; all calls return at once."""

    def __init__(self, host: str, port: int) -> None:
        self.target = (host, port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty network", daemon=True)
        self._thread.start()
        self._links: list[Link] = []

    def __enter__(self) -> FaultyNetwork:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.end()

    def link(self, seed: int = 0, **faults: float | None) -> Link:
        """A new way to the target; `seed` says which connections it cuts and how it jitters."""
        link = Link(self, Faults(**faults), random.Random(seed))
        self.run(link._listen())
        self._links.append(link)
        return link

    def end(self) -> None:
        """Cut everything and end the thread."""
        for link in self._links:
            link.close()
        self.run(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something in the network's own thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class Link:
    """One port. `connections` counts how many were opened."""

    def __init__(self, network: FaultyNetwork, faults: Faults, rng: random.Random) -> None:
        self.faults = faults
        self.port = 0
        self.connections = 0
        self._bytes = {"up": 0, "down": 0}
        self.waited_s = 0.0  # by which pieces left later than they came because of the rate
        self._network, self._rng = network, rng
        self._open: set[_Connection] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._free = {"up": 0.0, "down": 0.0}  # when the last bit in a direction is through
        self._closed = False

    @property
    def address(self) -> str:
        """Where to connect to."""
        return f"127.0.0.1:{self.port}"

    @property
    def up_bytes(self) -> int:
        """Bytes that arrived at the target."""
        return self._bytes["up"]

    @property
    def down_bytes(self) -> int:
        """Bytes that came back."""
        return self._bytes["down"]

    def cut(self) -> None:
        """Break all connections off; new ones are welcome."""
        self._do(self._cut)

    def stall(self) -> None:
        """Hold back everything, without a word to either end."""
        self._do(self._flowing.clear)

    def flow(self) -> None:
        """Let through what was held back, and what comes."""
        self._do(self._flowing.set)

    def close(self) -> None:
        """Break all connections off, and every new one at once."""
        self._closed = True
        self.cut()

    def open(self) -> None:
        """Take connections again."""
        self._closed = False

    def _do(self, what: Callable[[], None]) -> None:
        async def work() -> None:
            what()

        self._network.run(work())

    def _cut(self) -> None:
        for connection in list(self._open):
            connection.abort()

    async def _listen(self) -> None:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = int(server.sockets[0].getsockname()[1])

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._closed:
            writer.transport.abort()
            return
        try:
            there = await asyncio.open_connection(*self._network.target)
        except OSError:
            writer.transport.abort()
            return
        self.connections += 1
        connection = _Connection(self, (reader, writer), there)
        self._open.add(connection)
        try:
            await connection.run()
        finally:
            self._open.discard(connection)

    def _turned(self, turns: int) -> bool:
        """Whether a connection outlives a change of direction."""
        return turns <= HANDSHAKE_TURNS or self._rng.random() >= self.faults.cut_frac

    def _piece(self) -> int:
        rate = self.faults.bits_per_s
        return LARGEST if rate is None else max(64, min(LARGEST, int(rate / 8 * SLICE_S)))

    def _due(self, way: str, size: int, now: float) -> float:
        """When this piece is at the other end."""
        due = now
        if self.faults.bits_per_s is not None:
            due = self._free[way] = max(self._free[way], now) + 8 * size / self.faults.bits_per_s
            self.waited_s += due - now
        return due + self.faults.delay_s + self._rng.random() * self.faults.jitter_s


Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Connection:
    def __init__(self, link: Link, here: Ends, there: Ends) -> None:
        self._link, self._here, self._there = link, here, there
        self._way, self._turns = "", 0

    def abort(self) -> None:
        for _, writer in (self._here, self._there):
            writer.transport.abort()

    async def run(self) -> None:
        """Until either side closes."""
        ways = (("up", self._here[0], self._there[1]), ("down", self._there[0], self._here[1]))
        tasks = [asyncio.create_task(self._carry(*way)) for way in ways]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            for _, writer in (self._here, self._there):
                writer.close()

    async def _carry(self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(AHEAD)
        with contextlib.suppress(OSError):
            await asyncio.gather(self._take(way, reader, queue), self._give(way, writer, queue))

    async def _take(self, way: str, reader: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]]) -> None:
        loop, last = asyncio.get_running_loop(), 0.0
        while data := await reader.read(self._link._piece()):
            if way != self._way:
                self._way, self._turns = way, self._turns + 1
                if not self._link._turned(self._turns):
                    self.abort()
            last = max(last, self._link._due(way, len(data), loop.time()))  # nothing overtakes
            await queue.put((last, data))
        await queue.put((last, b""))

    async def _give(self, way: str, writer: asyncio.StreamWriter, queue: asyncio.Queue[tuple[float, bytes]]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, data = await queue.get()
            await asyncio.sleep(due - loop.time())
            await self._link._flowing.wait()
            if not data:
                return
            writer.write(data)
            await writer.drain()
            self._link._bytes[way] += len(data)
