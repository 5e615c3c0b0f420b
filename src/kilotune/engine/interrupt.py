"""Interrupt: Ctrl-C or a termination signal ends a loop between two steps, so that the last step is saved too."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """`requested` turns True at the first signal; the second one interrupts at once."""

    requested = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def between_steps() -> Iterator[Interrupt]:
    """Within, signals only set the flag. Outside the main thread, where Python delivers none, the flag stays down."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {number: signal.signal(number, interrupt._note) for number in SIGNALS}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
