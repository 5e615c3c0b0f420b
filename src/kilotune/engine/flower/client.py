"""The client's side of a deployed federation: one resident loop. No code from the server is ever run.

It joins, waits for requests, checks who made them and when, calls the handler (which keeps its model between calls) and
answers, until the server says finish or `stop` is set. A server that goes away is waited for; one that was restarted is
joined again.
"""

import contextlib
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from flwr.app import Message

from kilotune.core.errors import FederationError, WireError
from kilotune.engine.flower.certificates import load_private
from kilotune.engine.flower.fleet import AwayError, FleetLink, ForgottenError, RefusedError
from kilotune.engine.flower.keys import JoinFile
from kilotune.engine.flower.limits import Limits
from kilotune.engine.flower.messages import Handler, Reply, Request, attach, decode_request, encode_reply, seal_of
from kilotune.engine.flower.seals import Reader, Statement
from kilotune.engine.rounds.identity import Heads, HistoryError

HEARTBEAT_S = 20.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0
PUSH_TRIES = 6
T = TypeVar("T")


def serve(
    join: JoinFile,
    handler: Handler,
    wait_s: float = 60.0,
    on_event: Callable[[str], None] = lambda text: None,
    stop: threading.Event | None = None,
    heads: Heads | None = None,
    limits: Limits | None = None,
) -> None:
    """Take part until the server says finish. `wait_s` is how long to look for a server at the start; `heads`: what
    this client remembers of the server's history (nothing by default)."""
    stop, limits = stop or threading.Event(), limits or Limits()
    post = Post(join, heads or Heads(join.federation, join.client, join.server_key), handler, limits, on_event)
    loop = _Loop(FleetLink(join, limits), join, post, on_event, stop)
    try:
        loop.run(time.monotonic() + wait_s, wait_s)
    except RefusedError as error:
        raise FederationError(str(error)) from None
    finally:
        loop.link.leave()


class _Loop:
    """The state of one resident client."""

    def __init__(
        self, link: FleetLink, join: JoinFile, post: "Post", on_event: Callable[[str], None], stop: threading.Event
    ) -> None:
        self.link = link
        self._join, self._post, self._on_event, self._stop = join, post, on_event, stop

    def run(self, until: float, wait_s: float) -> None:
        """Join, work, and join again until finished or stopped."""
        pause, joined, told = FIRST_PAUSE_S, False, False
        while not self._stop.is_set():
            try:
                self._interruptible(self.link.activate)
                if self._stop.is_set():
                    return
                self._on_event(f"joined the federation at {self._join.server} as {self._join.client}")
                joined, told, pause = True, False, FIRST_PAUSE_S
                if self._work():
                    return
            except ForgottenError:
                self._on_event(f"server {self._join.server} was restarted; joining again")
            except AwayError as error:
                if not joined and time.monotonic() > until:
                    raise FederationError(
                        f"server {self._join.server} did not answer within {wait_s:g} s ({error}). "
                        "Start it, check the address, or wait longer with --wait."
                    ) from None
                if not told:
                    self._on_event(f"server {self._join.server} is away ({error}); trying again")
                    told = True
                self._stop.wait(pause * random.Random().uniform(0.8, 1.2))  # or all clients would come at once
                pause = min(2 * pause, LONGEST_PAUSE_S)

    def _work(self) -> bool:
        """Answer requests; True after finish."""
        pause = FIRST_PAUSE_S
        while not self._stop.is_set():
            asked = time.monotonic()
            message = self._interruptible(self.link.pull)
            if message is not None:
                pause = FIRST_PAUSE_S
                if self._answer(message):
                    return True
            elif time.monotonic() - asked < pause:  # a SuperLink that does not hold polls
                self._stop.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
        return False

    def _answer(self, message: Message) -> bool:
        with self._beating():
            answer = self._post.answer(message)
        self._push(answer.message)
        if not self._stop.is_set():  # or the push may have been broken off, and its request will come again
            self._post.sent(answer)
        if answer.fatal is not None:
            raise answer.fatal
        return answer.last

    def _push(self, reply: Message) -> None:
        pause = FIRST_PAUSE_S
        for attempt in range(PUSH_TRIES):
            try:
                self._interruptible(lambda: self.link.push(reply), patient=True)
                return
            except AwayError:
                if attempt + 1 == PUSH_TRIES or self._stop.wait(pause):
                    raise
                pause = min(2 * pause, LONGEST_PAUSE_S)

    @contextlib.contextmanager
    def _beating(self) -> Iterator[None]:
        """Send heartbeats while the handler works; what they meet is met again by the answer."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(HEARTBEAT_S):
                with contextlib.suppress(AwayError, RefusedError, ForgottenError):
                    self.link.heartbeat()

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()  # or it would open a second connection beside the answer's

    def _interruptible(self, call: Callable[[], T], patient: bool = False) -> T | None:
        """Run a blocking call in a thread, so that `stop` and Ctrl-C are heard within 0.1 s; None when stopped.
        `patient`: only Ctrl-C is, because the answer of a client that is stopped should still arrive."""
        box: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                box.put((call(), None))
            except BaseException as error:
                box.put((None, error))

        threading.Thread(target=run, name="fleet call", daemon=True).start()
        while True:
            try:
                value, error = box.get(timeout=0.1)
            except queue.Empty:
                if self._stop.is_set() and not patient:
                    return None
                continue
            if error is not None:
                raise error
            return value


@dataclass(frozen=True)
class _Answer:
    """A reply to push. `said`: the server's statement and signature when its request was in order; `fatal`: why this
    client takes no further part."""

    message: Message
    said: tuple[Statement, bytes] | None = None
    last: bool = False
    fatal: HistoryError | None = None


class Post:
    """From a message to the reply, without a network: every request is checked, every reply sealed."""

    def __init__(
        self, join: JoinFile, heads: Heads, handler: Handler, limits: Limits, on_event: Callable[[str], None]
    ) -> None:
        self._reader = Reader(join.federation, join.client, load_private(join.key), join.server_key)
        self._heads, self._handler, self._limits, self._on_event = heads, handler, limits, on_event
        self._last: tuple[Request, Reply] | None = None

    def answer(self, message: Message) -> _Answer:
        """The reply; a request that is not in order is not handed on, and nothing of it is kept."""
        try:
            request = decode_request(message)
            said = self._reader.open(request.kind, request, seal_of(message))
        except WireError as error:
            return _Answer(encode_reply(self._refusal(error), message))
        fatal = None
        try:
            self._heads.check(said[0])
            reply = self._reply(request)
        except WireError as error:
            reply = self._refusal(error)
        except HistoryError as error:
            reply, fatal = Reply(error=str(error)), error
        last = request.kind == "finish" and reply.error is None
        kept = said if reply.error is None else None
        return _Answer(self._sealed(reply, message, said[0]), kept, last, fatal)

    def _refusal(self, error: WireError) -> Reply:
        self._on_event(f"a request is refused: {error}")
        return Reply(error=f"request refused: {error}")

    def _reply(self, request: Request) -> Reply:
        if self._last is not None and self._last[0] == request and request.kind == "train":
            # The server lost the first answer. Training again would move the client's own state twice.
            self._on_event("asked again; sending the same answer")
            return self._last[1]
        reply = _safely(self._handler, request)
        self._last = (request, reply) if reply.error is None else None
        return reply

    def sent(self, answer: _Answer) -> None:
        """The server has this reply: its request will not be answered again, and its history stands."""
        if answer.said is not None:
            self._heads.note(*answer.said)

    def _sealed(self, reply: Reply, message: Message, asked: Statement) -> Message:
        limit = self._limits.reply(asked.kind)
        try:
            if (size := sum(map(len, reply.payloads))) > limit:
                raise WireError(f"{size} bytes, the recipe needs {limit} at most")
            answer = encode_reply(reply, message)
        except WireError as error:
            reply = Reply(error=f"reply cannot be sent: {error}")
            answer = encode_reply(reply, message)
        return attach(answer, self._reader.seal(asked, reply, reply.error))


def _safely(handler: Handler, request: Request) -> Reply:
    """Call the handler; what it raises becomes the error of the reply, so that the server hears of it."""
    try:
        return handler(request)
    except HistoryError:
        raise
    except Exception as error:
        return Reply(error=f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
