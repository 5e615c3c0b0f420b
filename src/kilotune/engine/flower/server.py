"""The server's side of a deployed federation: one SuperLink, and the Exchange over it."""

import errno
import queue
import socket
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kilotune.core.errors import FederationError, WireError
from kilotune.engine.flower.keys import ServerKeys, address
from kilotune.engine.flower.limits import Limits
from kilotune.engine.flower.messages import Reply, Request, decode_reply
from kilotune.engine.flower.seals import Desk
from kilotune.engine.flower.traffic import Traffic, listen
from kilotune.engine.rounds.identity import RunIdentity

if TYPE_CHECKING:
    from flwr.app import Message

    from kilotune.engine.flower.superlink import SuperLink

GRACE_S = 30.0  # without a deadline, how long a client may be away before its answer is given up
TICK_S = 0.5


def start_server(
    keys: ServerKeys,
    host: str,
    port: int,
    on_event: Callable[[str], None] = lambda text: None,
    identity: RunIdentity | None = None,
    limits: Limits | None = None,
) -> "SuperLinkExchange":
    """Listen on host:port (port 0 takes a free one) and return once clients can join.

    `identity`: of the run that is led; without one, of a run that ends with this process.
    """
    listener = _listen(host, port)  # before Flower's server is imported, which takes seconds
    try:
        if not keys.clients:
            raise FederationError(f"{keys.folder}: no client is enrolled. Add some with: kilotune server init.")
        from kilotune.engine.flower.superlink import SuperLink

        identity = identity or RunIdentity.fresh()
        desk = Desk(keys.federation, identity.run, identity.start, keys.signing_key(), keys.clients)
        link = SuperLink(keys, listener, desk, limits or Limits())
        link.start()
    except BaseException:
        listener.close()
        raise
    return SuperLinkExchange(link, address(host, listener.getsockname()[1]), on_event)


class SuperLinkExchange:
    """An Exchange with clients in other processes. One exchange at a time."""

    def __init__(self, link: "SuperLink", where: str, on_event: Callable[[str], None]) -> None:
        self.address = where
        self._link, self._on_event = link, on_event
        self._kept: set[str] = set()

    def roster(self) -> list[str]:
        """Clients that are connected now."""
        return sorted(self._link.online())

    def limit(self, limits: Limits) -> None:
        """Hold messages to these sizes from now on."""
        self._link.limits = limits

    def wait_for(self, count: int, timeout_s: float) -> list[str]:
        """Return the roster as soon as it holds `count` clients, or after the timeout as it is."""
        end = time.monotonic() + timeout_s
        while len(self.roster()) < count and (left := end - time.monotonic()) > 0:
            self._next(min(left, TICK_S))
        return self.roster()

    def exchange(
        self, requests: dict[str, Request], deadline_s: float | None = None, keep: bool = False
    ) -> Iterator[tuple[str, Reply]]:
        """Send now; replies come from the iterator. A client that comes back in time is asked again."""
        unknown = sorted(set(requests) - set(self._link.nodes))
        if unknown:
            raise FederationError(f"exchange: {', '.join(unknown)} not enrolled. Add with: kilotune server init.")
        end = None if deadline_s is None else time.monotonic() + deadline_s
        for name in sorted(requests):
            self._link.send(name, requests[name])
        return self._replies(set(requests), end, keep)

    def kept(self) -> set[str]:
        """Clients whose requests are open still."""
        return set(self._kept)

    def give_up(self, clients: list[str]) -> None:
        """Take requests back that were kept open."""
        for name in self._kept & set(clients):
            self._link.withdraw(name)
        self._kept -= set(clients)

    def traffic(self) -> dict[str, Traffic] | None:
        """Bytes on each client's socket since this server started."""
        return self._link.meter.totals()

    def close(self) -> None:
        """Stop listening. Clients keep trying until a server answers at this address again."""
        self._link.stop()

    def _replies(self, asked: set[str], end: float | None, keep: bool) -> Iterator[tuple[str, Reply]]:
        waiting = asked | (self._kept if keep else set())
        wanted = asked or waiting  # that an earlier request is not answered yet holds nobody up
        seen = dict.fromkeys(waiting, time.monotonic())
        try:
            for name in sorted(waiting - asked):  # they may have answered while nobody listened
                yield from self._taken(name, waiting)
            while waiting & wanted and (left := TICK_S if end is None else end - time.monotonic()) > 0:
                what, name = self._next(min(left, TICK_S))
                if what == "replied" and name in waiting:
                    yield from self._taken(name, waiting)
                if end is None:
                    self._give_up(waiting, seen)
        finally:
            if keep:
                self._kept = waiting
            else:
                for name in waiting:
                    self._link.withdraw(name)
            self._link.grid.tidy()

    def _taken(self, name: str, waiting: set[str]) -> Iterator[tuple[str, Reply]]:
        for message in self._link.take(name):
            waiting.remove(name)
            yield name, _understood(message)

    def _give_up(self, waiting: set[str], seen: dict[str, float]) -> None:
        now, online = time.monotonic(), self._link.online()
        seen.update(dict.fromkeys(waiting & online, now))
        for name in sorted(waiting - online):
            if now - seen[name] > GRACE_S:
                waiting.remove(name)
                self._link.withdraw(name)
                self._on_event(f"{name} has been away for {GRACE_S:g} s; going on without it")

    def _next(self, timeout_s: float) -> tuple[str, str]:
        """The next event, told to the listener; ("", "") when nothing happened."""
        try:
            what, name = self._link.events.get(timeout=timeout_s)
        except queue.Empty:
            return "", ""
        if what != "replied":
            self._on_event(f"{name} {what}")
        return what, name


def _understood(message: "Message") -> Reply:
    try:
        return decode_reply(message)
    except WireError as error:
        return Reply(error=f"reply not understood: {error}")


def _listen(host: str, port: int) -> socket.socket:
    try:
        return listen(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise FederationError(
                f"port {port} on {host} is taken. Choose another with `kilotune server init --port`, "
                "or stop what listens there."
            ) from None
        reason = error.strerror or error
        raise FederationError(
            f"cannot listen on {address(host, port)}: {reason}. Choose another with --host."
        ) from None
