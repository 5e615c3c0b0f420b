"""kilotune: one command line for tuning alone, federations, and what comes after."""

import os
import sys
from typing import Annotated

import typer

from kilotune import __version__
from kilotune.cli import inspect, model, train
from kilotune.core.errors import KilotuneError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Fine-tune a language model on one small device, or together over many, for kilobytes.",
)
train.register(app)
model.register(app)
inspect.register(app)

_debug = False


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Fine-tune a language model on one small device, or together over many, for kilobytes."""
    global _debug
    _debug = debug
    if version:
        typer.echo(f"kilotune {__version__}")
        raise typer.Exit


def main() -> None:
    """Run; known errors end with one red line and exit code 2 (a mistake) or 1 (the world failed)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    try:
        app()
    except KilotuneError as error:
        if _debug:
            raise
        for line in str(error).splitlines():
            typer.secho(line, err=True, fg="red")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.secho("interrupted. Run the same command again to go on where it stopped.", err=True, fg="yellow")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
