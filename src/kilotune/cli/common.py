"""What all commands share: options, results on stdout, and errors as one clear line."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from kilotune.engine.composing.plan import Plan

Format = Annotated[
    Literal["text", "json"], typer.Option("--format", help="text for people, json for scripts (one object on stdout).")
]
Override = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one value, e.g. optimizer.lr=1e-3. Repeatable."),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Run folder; an unfinished one is resumed.")
]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file (YAML), or the name of a shipped one.")]
Template = Literal["chat", "plain", "alpaca"]
QUICK_S = 0.5


@contextmanager
def loading(emit: Callable[[dict[str, Any]], None], what: str) -> Iterator[None]:
    """Says what is loaded before the imports inside, which take seconds, and hurries them."""
    import gc

    from kilotune.engine.model.lean import unhurried_gc

    emit({"event": "status", "text": f"loading {what}"})
    with unhurried_gc():
        yield
        gc.freeze()  # none of it goes away any more: later collections need not look at it


@contextmanager
def patiently(what: str) -> Iterator[None]:
    """For what is mostly quick: says what is loaded only when it takes half a second."""
    import threading

    timer = threading.Timer(QUICK_S, say, [f"loading {what}"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def compose_either(recipe: str, overrides: list[str] | None) -> "Plan":
    """The plan of a recipe, for one machine when it counts steps, else for a federation."""
    from kilotune.engine.composing.compose import build, override, read

    content = override(read(recipe), overrides or [])
    return build(content, "tune" if content.get("steps") else "federate")


def show(result: dict[str, Any] | list[dict[str, Any]], format: str, text: Callable[[], object]) -> None:
    """The result: one line of JSON on stdout, or the human view."""
    if format == "json":
        sys.stdout.write(json.dumps(result, allow_nan=False) + "\n")
    else:
        text()


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """A table on stdout; numbers are aligned right."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title or None, title_justify="left", header_style="bold")
    content = [[("" if cell is None else str(cell)) for cell in row] for row in rows]
    for index, column in enumerate(columns):
        numeric = bool(content) and all(_numeric(row[index]) for row in content)
        grid.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in content:
        grid.add_row(*row)
    Console().print(grid)


def _numeric(text: str) -> bool:
    return not text or text[0].isdigit() or (text[0] in "+-" and text[1:2].isdigit())


def say(line: str) -> None:
    """One line for people, on stderr, so that stdout stays the result's."""
    typer.echo(line, err=True)


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
