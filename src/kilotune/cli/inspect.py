"""Commands that look and predict: plan, methods, recipe, data, doctor."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kilotune.cli.common import Format, Override, RecipeName, Template, compose_either, say, show, table

data_app = typer.Typer(no_args_is_help=True, help="Look at data as a model will see it.")
recipe_app = typer.Typer(no_args_is_help=True, help="List, show and check recipes.")


def register(app: typer.Typer) -> None:
    app.command()(plan)
    app.command()(methods)
    app.add_typer(recipe_app, name="recipe")
    app.add_typer(data_app, name="data")
    app.command()(doctor)


def plan(
    recipe: RecipeName = "kilotune",
    overrides: Override = None,
    clients: Annotated[
        int | None, typer.Option(min=1, help="Number of clients; default: counted from the data.")
    ] = None,
    probe: Annotated[bool, typer.Option("--probe/--no-probe", help="Run one step to measure its time.")] = True,
    format: Format = "text",
) -> None:
    """Predict bytes, memory and time of a recipe before running it."""
    from kilotune.core.units import human_bytes, human_seconds
    from kilotune.engine.planner import predict

    composed = compose_either(recipe, overrides)
    result = predict(composed, clients, probe)

    def text() -> None:
        rows: list[list[Any]] = [["trainable numbers", f"{result['trainable']:,}"]]
        if "payload_up_bytes_per_client_round" in result:
            rows += [
                ["payload up, per client and round", human_bytes(result["payload_up_bytes_per_client_round"])],
                ["payload down, per client and round", human_bytes(result["payload_down_bytes_per_client_round"])],
            ]
        rows.append(["peak memory", human_bytes(result["peak_rss_bytes"])])
        if result["seconds_per_step"] is not None:
            rows += [
                ["time per step", human_seconds(result["seconds_per_step"])],
                ["time in all, without evaluation", human_seconds(result["seconds"])],
            ]
        table(composed.recipe.title or recipe, ["", "predicted"], rows)

    show(result, format, text)


def methods(
    kind: Annotated[str | None, typer.Option(metavar="KIND", help="Only this kind.")] = None,
    papers: Annotated[bool, typer.Option("--papers", help="Print docs/papers.md.")] = False,
    format: Format = "text",
) -> None:
    """List every method, its kind and its paper."""
    from kilotune.core.errors import RecipeError
    from kilotune.core.registry import KINDS, nearest
    from kilotune.engine.catalogue import catalogue, papers_page

    if kind is not None and kind not in KINDS:
        raise RecipeError(f"--kind: got {kind!r}, expected one of {', '.join(KINDS)}.{nearest(kind, list(KINDS))}")
    if papers:
        typer.echo(papers_page(), nl=False)
        return
    found = [entry for entry in catalogue() if kind in (None, entry["kind"])]
    rows = [[e["kind"], e["name"], e["summary"], e["paper"]] for e in found]
    show(found, format, lambda: table("", ["kind", "name", "what", "paper"], rows))


@recipe_app.command("list")
def recipe_list(format: Format = "text") -> None:
    """The recipes that come with kilotune."""
    from kilotune.engine.compose import read, shipped

    found = {name: read(name).get("title", "") for name in shipped()}
    show({"recipes": found}, format, lambda: table("", ["recipe", "what"], found.items()))


@recipe_app.command("show")
def recipe_show(recipe: RecipeName, overrides: Override = None, format: Format = "text") -> None:
    """The resolved recipe: every value, defaults included. Redirect it to a file to start your own."""
    import yaml

    resolved = compose_either(recipe, overrides).resolved()
    show(resolved, format, lambda: typer.echo(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), nl=False))


@recipe_app.command("check")
def recipe_check(recipe: RecipeName, overrides: Override = None, format: Format = "text") -> None:
    """Print every mistake in a recipe, or its id."""
    checked = compose_either(recipe, overrides)
    mode = "tune" if checked.recipe.steps else "federate"
    show({"recipe_id": checked.id, "mode": mode}, format, lambda: say(f"fine; recipe id {checked.id} ({mode})"))


@data_app.command("show")
def data_show(
    path: Annotated[str, typer.Argument(metavar="FILE", help="File, folder, hub id or `households`.")],
    limit: Annotated[int, typer.Option(min=0, help="Rows to print.")] = 3,
    base: Annotated[str, typer.Option("--base", help="Model whose tokenizer and template are used.")] = "smollm2-135m",
    template: Annotated[Template, typer.Option(help="Layout of a conversation as text.")] = "chat",
    max_length: Annotated[int, typer.Option(min=8, help="Tokens per row; longer rows are cut.")] = 512,
    format: Format = "text",
) -> None:
    """Print rows with the tokens that carry loss marked, and count what there is."""
    from kilotune.engine.preview import preview

    result = preview(path, limit, base, template, max_length)

    def text() -> None:
        from rich.console import Console

        console = Console()
        for row in result["rows"]:
            console.rule(f"{row['where']} ({row['split']})", align="left")
            for segment in row["segments"]:
                console.print(segment["text"], style="bold green" if segment["loss"] else "", end="", markup=False)
            console.print()
        counts = ", ".join(f"{count} {name}" for name, count in result["splits"].items())
        say(f"{counts}; {len(result['clients'])} clients; {result['num_truncated']} rows cut at {max_length} tokens")
        say(f"{result['label_tokens']} of {result['tokens']} tokens carry loss (shown in green)")

    show(result, format, text)


@data_app.command("households")
def data_households(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="JSON Lines file to write.")],
    format: Format = "text",
) -> None:
    """Write the embedded demo data to a file, to see what a data file looks like."""
    from kilotune.engine.households import write_jsonl

    count = write_jsonl(output)
    show({"file": str(output), "rows": count}, format, lambda: say(f"wrote {count} rows to {output}"))


def doctor(format: Format = "text") -> None:
    """Check this machine: versions, memory, disk, cache, the embedded model."""
    from kilotune.engine.catalogue import health

    result = health()
    rows = [[c["check"], "ok" if c["ok"] else "PROBLEM", c["found"]] for c in result["checks"]]
    show(result, format, lambda: table("", ["check", "", "found"], rows))
    if not result["ok"]:
        raise typer.Exit(1)
