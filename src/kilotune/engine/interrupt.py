"""Interrupt: Ctrl-C or a termination signal ends a loop between two steps, so that the last step is saved too."""

import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from kilotune.core.errors import KilotuneError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PAUSES = ("round", "evaluation")  # events after which everything is on the disk and nobody waits
Emit = Callable[[dict[str, Any]], None]


class StoppedError(KilotuneError):
    """The run was asked to stop and did: no failure. A service manager's stop succeeds, Ctrl-C ends with 130."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.exit_code = 0 if number == signal.SIGTERM else 130


class Interrupt:
    """`requested` turns True at the first signal; the second one interrupts at once."""

    requested = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


class Stop(Interrupt):
    """An interrupt of a run that others take part in: the first signal is announced, and `asked` is set."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.number = 0
        self._bell: queue.SimpleQueue[int] = queue.SimpleQueue()

    def between_rounds(self, emit: Emit) -> Emit:
        """An emit that ends the run after the next event of PAUSES once a signal has come."""

        def watched(event: dict[str, Any]) -> None:
            emit(event)
            if self.requested and event["event"] in PAUSES:
                raise StoppedError(
                    f"stopped after round {event['round']}, as asked. Run the same command again to go on.", self.number
                )

        return watched

    def _note(self, number: int, frame: FrameType | None) -> None:
        super()._note(number, frame)
        self.number = number
        self._bell.put(number)  # a handler may take no lock: what it interrupts may hold it

    def announce(self, emit: Emit) -> None:
        """Wait for the first signal and tell of it; 0 ends the waiting."""
        if number := self._bell.get():
            self.asked.set()
            emit({"event": "stopping", "why": signal.Signals(number).name})

    def close(self) -> None:
        self._bell.put(0)


@contextmanager
def between_steps() -> Iterator[Interrupt]:
    """Within, signals only set the flag. Outside the main thread, where Python delivers none, the flag stays down."""
    interrupt = Interrupt()
    with _handled_by(interrupt):
        yield interrupt


@contextmanager
def asked_to_stop(emit: Emit) -> Iterator[Stop]:
    """Within, the first signal is announced to `emit` at once, from a thread of its own, and acted on later."""
    stop = Stop()
    teller = threading.Thread(target=stop.announce, args=(emit,), name="stop", daemon=True)
    teller.start()
    try:
        with _handled_by(stop):
            yield stop
    finally:
        stop.close()
        teller.join()


@contextmanager
def _handled_by(interrupt: Interrupt) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt._note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
