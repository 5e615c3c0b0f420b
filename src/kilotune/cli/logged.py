"""How the commands that run for days tell what happens: lines for people, or one JSON object a line for a log."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import click
import typer

from kilotune.core.errors import KilotuneError

LogFormat = Annotated[
    Literal["text", "json"],
    typer.Option("--log-format", help="On stderr: lines for people, or one JSON object a line with time and level."),
]
Emit = Callable[[dict[str, Any]], None]


@contextmanager
def logged(log_format: str, screen: Emit) -> Iterator[Emit]:
    """The emit of a command. In JSON an error is a line as well, so that nothing on stderr is anything else."""
    if log_format == "text":
        yield screen
        return
    from kilotune.engine.operations.logs import json_lines

    with json_lines() as emit:
        try:
            yield emit
        except KilotuneError as error:
            if click.get_current_context().find_root().params["debug"]:
                raise
            emit({"event": "failed" if error.exit_code in (1, 2) else "stopped", "why": str(error)})
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            emit({"event": "stopped", "why": "interrupted"})
            raise typer.Exit(130) from None
