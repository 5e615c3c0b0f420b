"""kilotune: one command line for tuning alone, federations, and what comes after."""

import os
import signal
import warnings
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from kilotune import __version__
from kilotune.cli import doctor, history, inspect, model, train
from kilotune.core.errors import KilotuneError

RESUMABLE = ("tune", "federate", "server", "client")


class Program(TyperGroup):
    """All commands. Known errors end with red lines and exit code 2 (a mistake) or 1 (the world failed), Ctrl-C with
    one yellow line and 130; any other exception is a bug in kilotune and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KilotuneError as error:
            if ctx.params["debug"]:
                raise
            for line in str(error).splitlines():
                typer.secho(line, err=True, fg="red" if error.exit_code in (1, 2) else "yellow")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:  # here, because typer would leave without a word
            goes_on = " Run the same command again to go on." if ctx.invoked_subcommand in RESUMABLE else ""
            typer.secho(f"interrupted.{goes_on}", err=True, fg="yellow")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Program,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Fine-tune a language model on one small device, or together over many, for kilobytes.",
)
train.register(app)
model.register(app)
inspect.register(app)
history.register(app)
doctor.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kilotune {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Fine-tune a language model on one small device, or together over many, for kilobytes."""


def main() -> None:
    """Run the command that the arguments name."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service manager's stop is as good as Ctrl-C
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries to their callers; no user can act on it
    app()
