"""Commands that look and predict: plan, methods, recipe, data."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kilotune.cli.common import (
    Format,
    Override,
    RecipeName,
    Template,
    compose_either,
    loading,
    patiently,
    say,
    show,
    table,
)

data_app = typer.Typer(no_args_is_help=True, help="Look at data as a model will see it.")
recipe_app = typer.Typer(no_args_is_help=True, help="List, show and check recipes.")


def register(app: typer.Typer) -> None:
    app.command()(plan)
    app.command()(methods)
    app.add_typer(recipe_app, name="recipe")
    app.add_typer(data_app, name="data")


def plan(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="Recipe file (YAML), or the name of a shipped one.")
    ] = None,
    overrides: Override = None,
    clients: Annotated[
        int | None, typer.Option(min=1, help="Number of clients; default: counted from the data.")
    ] = None,
    probe: Annotated[
        bool | None,
        typer.Option("--probe/--no-probe", help="Measure anew, or not at all; default: once on every machine."),
    ] = None,
    max_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Propose what fits, e.g. in 2GB.")] = None,
    max_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Up and down together, per client and round, e.g. 20KB.")
    ] = None,
    max_minutes: Annotated[float | None, typer.Option(help="The run on this machine, without evaluation.")] = None,
    format: Format = "text",
) -> None:
    """Predict bytes, memory and time of a recipe before running it, or find one that fits a budget."""
    from kilotune.cli.display import Display

    limited = any(limit is not None for limit in (max_memory, max_bytes, max_minutes))
    with Display(None, "") as emit:
        with loading(emit, recipe or ("recipes" if limited else "kilotune")):
            from kilotune.engine.planning.budget import Budget, propose
            from kilotune.engine.planning.planner import predict
        if limited:
            budget = Budget.of(max_memory, max_bytes, max_minutes)
            result = propose(recipe, overrides or [], clients, budget, emit)
        else:
            composed = compose_either(recipe or "kilotune", overrides)
            result = predict(composed, clients, probe, emit)
    if limited:
        show(result, format, lambda: _print_proposals(result))
    else:
        show(result, format, lambda: _print_prediction(composed.recipe.title or str(recipe), result))


def _print_prediction(title: str, result: dict[str, Any]) -> None:
    from kilotune.core.units import human_bytes, human_seconds

    rows: list[list[Any]] = [["trainable numbers", f"{result['trainable']:,}"]]
    if "payload_up_bytes_per_client_round" in result:
        rows += [
            ["payload up, per client and round", human_bytes(result["payload_up_bytes_per_client_round"])],
            ["payload down, per client and round", human_bytes(result["payload_down_bytes_per_client_round"])],
        ]
    if "secure_up_bytes_per_client_round" in result:
        rows += [
            ["of it secure aggregation, up", human_bytes(result["secure_up_bytes_per_client_round"])],
            ["of it secure aggregation, down", human_bytes(result["secure_down_bytes_per_client_round"])],
        ]
    if "secure_seconds_per_round" in result:
        rows.append(["secure aggregation, time per round", human_seconds(result["secure_seconds_per_round"])])
    rows.append(["peak memory", human_bytes(result["peak_rss_bytes"])])
    if "client_peak_rss_bytes" in result:
        rows.append(["of a client of its own", human_bytes(result["client_peak_rss_bytes"])])
    if result["seconds_per_step"] is not None:
        rows += [
            ["time per step", human_seconds(result["seconds_per_step"])],
            ["time in all, without evaluation", human_seconds(result["seconds"])],
        ]
    table(title, ["", "predicted"], rows)


def _print_proposals(result: dict[str, Any]) -> None:
    from kilotune.core.units import human_bytes, human_seconds
    from kilotune.engine.planning.budget import wire_bytes

    rows = []
    for entry in [*result["fits"], *result["exceeds"]]:
        sent, seconds = wire_bytes(entry), entry["seconds"]
        rows.append(
            [
                " ".join([entry["recipe"], *entry["set"]]),
                human_bytes(entry["peak_rss_bytes"]),
                "" if sent is None else human_bytes(sent),
                "" if seconds is None else human_seconds(seconds),
                "; ".join(entry["exceeds"]) or "fits",
            ]
        )
    columns = ["recipe and dials", "memory", "up + down", "time", "within the budget?"]
    table("expected order, measured on clinc150: best first", columns, rows)
    if result["fits"]:
        best = result["fits"][0]
        sets = "".join(f" --set {assignment}" for assignment in best["set"])
        verb = "federate" if "payload_up_bytes_per_client_round" in best else "tune"
        say(f"the best that fits: kilotune {verb} {best['recipe']}{sets}")
    else:
        say("nothing fits; the last column says what is in the way of each")


def methods(
    kind: Annotated[str | None, typer.Option(metavar="KIND", help="Only this kind.")] = None,
    papers: Annotated[bool, typer.Option("--papers", help="Print docs/papers.md (in a checkout of kilotune).")] = False,
    format: Format = "text",
) -> None:
    """List every method, its kind and its paper."""
    with patiently("methods"):
        from kilotune.core.errors import RecipeError
        from kilotune.core.registry import KINDS, nearest
        from kilotune.engine.reporting.catalogue import catalogue
        from kilotune.engine.reporting.papers import papers_page

        if kind is not None and kind not in KINDS:
            raise RecipeError(f"--kind: got {kind!r}, expected one of {', '.join(KINDS)}.{nearest(kind, list(KINDS))}")
        page = papers_page(Path()) if papers else ""
        found = [] if papers else [entry for entry in catalogue() if kind in (None, entry["kind"])]
    if papers:
        typer.echo(page, nl=False)
        return
    rows = [[e["kind"], e["name"], e["summary"], e["paper"]] for e in found]
    show(found, format, lambda: table("", ["kind", "name", "what", "paper"], rows))


@recipe_app.command("list")
def recipe_list(format: Format = "text") -> None:
    """The recipes that come with kilotune."""
    with patiently("recipes"):
        from kilotune.engine.composing.compose import read, shipped

        found = {name: read(name).get("title", "") for name in shipped()}
    show({"recipes": found}, format, lambda: table("", ["recipe", "what"], found.items()))


@recipe_app.command("show")
def recipe_show(recipe: RecipeName, overrides: Override = None, format: Format = "text") -> None:
    """The resolved recipe: every value, defaults included. Redirect it to a file to start your own."""
    import yaml

    with patiently(recipe):
        resolved = compose_either(recipe, overrides).resolved()
    show(resolved, format, lambda: typer.echo(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), nl=False))


@recipe_app.command("check")
def recipe_check(recipe: RecipeName, overrides: Override = None, format: Format = "text") -> None:
    """Print every mistake in a recipe, or its id."""
    with patiently(recipe):
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
    from kilotune.cli.display import Display

    with Display(None, "") as emit:
        with loading(emit, path):
            from kilotune.engine.rows.preview import preview
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
    with patiently("households"):
        from kilotune.engine.rows.households import write_jsonl

        count = write_jsonl(output)
    show({"file": str(output), "rows": count}, format, lambda: say(f"wrote {count} rows to {output}"))
