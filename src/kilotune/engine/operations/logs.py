"""Structured logs: one JSON object a line with time, level, event and its facts, through the standard library.

Only numbers and the texts named here are logged. Rows, answers and losses of single clients never reach an event's
facts that pass this list, whatever an event of the future carries.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TextIO

from kilotune.core.lines import clean

LOGGER = logging.getLogger("kilotune")
TEXTS = ("client", "status", "why", "reason", "text", "head", "digest", "data_digest", "who")
PRIVATE = ("loss", "loss_first")  # of one client's rows
QUIET = ("progress",)
TEXT_LENGTH = 300
WARNINGS = {"refused", "error", "missing"}

Emit = Callable[[dict[str, Any]], None]


class JsonLines(logging.Formatter):
    """A record as one line of JSON; what other libraries log becomes the event `message`."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line: dict[str, Any] = {"time": time, "level": record.levelname.lower()}
        facts = getattr(record, "facts", None)
        if facts is None:
            facts = {"event": "message", "logger": record.name, "text": clean(record.getMessage(), TEXT_LENGTH)}
            if record.exc_info and record.exc_info[0] is not None:
                facts["error"] = record.exc_info[0].__name__
        return json.dumps(line | facts, allow_nan=False)


def log(event: dict[str, Any]) -> None:
    """Log one event of a run."""
    kind = str(event["event"])
    if kind in QUIET:
        return
    level = logging.WARNING if event.get("status") in WARNINGS else logging.INFO
    LOGGER.log(logging.ERROR if kind == "failed" else level, kind, extra={"facts": {"event": kind} | facts_of(event)})


def facts_of(event: dict[str, Any]) -> dict[str, Any]:
    """What of an event may be logged: numbers, the texts of TEXTS, and the overall figures of an evaluation."""
    hidden = PRIVATE if event["event"] == "client" else ()
    facts: dict[str, Any] = {}
    for key, value in [*event.items(), *(event.get("overall") or {}).items()]:
        if isinstance(value, bool | int | float) and key not in hidden:
            facts[key] = value if value == value and abs(value) != float("inf") else None
        elif isinstance(value, str) and key in TEXTS:
            facts[key] = clean(value, TEXT_LENGTH)
    facts.pop("time", None)  # the line has its own
    return facts


@contextmanager
def json_lines(file: TextIO | None = None) -> Iterator[Emit]:
    """Within, what is logged in this process is JSON on `file` (stderr): our events, and other libraries' warnings.
    Yields the emit that logs events."""
    handler = logging.StreamHandler(sys.stderr if file is None else file)
    handler.setFormatter(JsonLines())
    handler.addFilter(lambda record: record.name == LOGGER.name or record.levelno >= logging.WARNING)
    root = logging.getLogger()
    handlers, level = root.handlers, LOGGER.level
    root.handlers = [handler]
    LOGGER.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield log
    finally:
        logging.captureWarnings(False)
        root.handlers = handlers
        LOGGER.setLevel(level)
