"""Command that examines: doctor."""

from pathlib import Path
from typing import Annotated

import typer

from kilotune.cli.common import Format, Override, compose_either, patiently, show, table


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(
    join: Annotated[
        Path | None, typer.Option("--join", metavar="FILE", help="Also check this client's way to its server.")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option("--keys", metavar="FOLDER", help="Also check the keys and port of a server.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Also check that there is memory for this recipe.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", metavar="A B", help="Also compare the histories that two clients' folders hold."),
    ] = None,
    overrides: Override = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Run folder whose disk is looked at.")
    ] = Path("runs"),
    format: Format = "text",
) -> None:
    """Check this machine, and with --join or --keys the federation: keys, certificates, clocks, ports, versions."""
    with patiently("checks"):
        from kilotune.core.errors import RecipeError
        from kilotune.engine.operations.doctor import examine

        if overrides and recipe is None:
            raise RecipeError("--set: nothing to set without a recipe. Name one with --recipe.")
        plan = compose_either(recipe, overrides) if recipe else None
        result = examine(join, keys, plan, output, compare)
    rows = [[c["check"], "ok" if c["ok"] else "PROBLEM", c["found"], c["fix"]] for c in result["checks"]]
    show(result, format, lambda: table("", ["check", "", "found", "what to do"], rows))
    if not result["ok"]:
        raise typer.Exit(1)
