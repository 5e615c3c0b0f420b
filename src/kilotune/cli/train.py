"""Commands that train: tune, federate, server, client."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kilotune.cli.common import (
    Format,
    Output,
    Override,
    RecipeName,
    loading,
    number,
    patiently,
    percent,
    say,
    show,
    table,
)
from kilotune.cli.logged import LogFormat, logged

server_app = typer.Typer(no_args_is_help=True, help="Lead a federation over real machines.")


def register(app: typer.Typer) -> None:
    app.command()(tune)
    app.command()(federate)
    app.add_typer(server_app, name="server")
    app.command()(client)


def tune(
    recipe: RecipeName, overrides: Override = None, output: Output = Path("runs/tune"), format: Format = "text"
) -> None:
    """Fine-tune on this machine, with its own data."""
    from kilotune.cli.display import Display

    with Display(None, "step") as emit:
        with loading(emit, recipe):
            from kilotune.engine.alone import tune as run
            from kilotune.engine.composing.compose import compose
        plan = compose(recipe, "tune", overrides or [])
        emit.total = plan.recipe.steps
        summary = run(plan, output, emit)
    show(summary, format, lambda: _outcome(summary, output))


def federate(
    recipe: RecipeName = "kilotune",
    overrides: Override = None,
    output: Output = Path("runs/federate"),
    format: Format = "text",
) -> None:
    """Run a whole federation on this machine: try it here before you deploy it."""
    from kilotune.cli.display import Display

    with Display(None, "round") as emit:
        with loading(emit, recipe):
            from kilotune.engine.composing.compose import compose
            from kilotune.engine.session import federate as run
        plan = compose(recipe, "federate", overrides or [])
        emit.total = plan.recipe.rounds
        summary = run(plan, output, emit)
    show(summary, format, lambda: _outcome(summary, output))


@server_app.command("init")
def server_init(
    folder: Annotated[Path, typer.Argument(help="Folder for keys and join files; keep it private.")],
    clients: Annotated[list[str], typer.Option("--client", "-c", help="Name of a client to enrol. Repeatable.")],
    host: Annotated[str, typer.Option(help="Name or address under which clients reach this server.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port clients connect to.")] = 8443,
    format: Format = "text",
) -> None:
    """Make the server's keys and one join file per client. Run again to enrol more clients."""
    with patiently("keys"):
        from kilotune.engine.flower.keys import init_server

        keys = init_server(folder, host, port, clients)
    joins = {name: str(keys.join_path(name)) for name in keys.clients}
    show(
        {"folder": str(folder), "address": f"{host}:{port}", "join_files": joins},
        format,
        lambda: table(f"server {host}:{port}", ["client", "give this file to it, over a safe way"], joins.items()),
    )


@server_app.command("revoke")
def server_revoke(
    folder: Annotated[Path, typer.Argument(help="Folder made by `kilotune server init`.")],
    client: Annotated[str, typer.Argument(help="Client that may no longer take part.")],
    format: Format = "text",
) -> None:
    """Strike a client from the list; takes effect when the server starts next."""
    with patiently("keys"):
        from kilotune.engine.flower.keys import revoke

        left = sorted(revoke(folder, client).clients)
    show({"revoked": client, "clients": left}, format, lambda: say(f"{client} is out; left: {', '.join(left)}"))


@server_app.command("rotate")
def server_rotate(
    folder: Annotated[Path, typer.Argument(help="Folder made by `kilotune server init`.")],
    client: Annotated[str, typer.Argument(help="Client that gets a new key.")],
    format: Format = "text",
) -> None:
    """Make a new key, certificate and join file for a client; the old ones end when the server starts next."""
    with patiently("keys"):
        from kilotune.engine.flower.keys import rotate

        path = str(rotate(folder, client).join_path(client))
    show({"rotated": client, "join_file": path}, format, lambda: say(f"give {path} to {client}, over a safe way"))


@server_app.command("run")
def server_run(
    recipe: RecipeName = "kilotune",
    keys: Annotated[Path, typer.Option("--keys", help="Folder made by `kilotune server init`.")] = Path("keys"),
    overrides: Override = None,
    output: Output = Path("runs/server"),
    wait_for: Annotated[int, typer.Option(min=0, help="Start when this many clients are there; 0: all enrolled.")] = 0,
    dashboard: Annotated[
        str | None, typer.Option(metavar="[HOST:]PORT", help="Live page, /health and /metrics; HOST is 127.0.0.1.")
    ] = None,
    log_format: LogFormat = "text",
    format: Format = "text",
) -> None:
    """Lead the federation: wait for the clients, run the rounds, keep the ledger."""
    from kilotune.cli.display import Display

    with Display(None, "round", quiet=log_format == "json") as screen, logged(log_format, screen) as emit:
        with loading(emit, recipe):
            from kilotune.engine.composing.compose import compose
            from kilotune.engine.deployed import serve
            from kilotune.engine.operations.monitor import monitored
        plan = compose(recipe, "federate", overrides or [])
        screen.total = plan.recipe.rounds
        with monitored(dashboard, plan, keys, output, emit) as watched:
            summary = serve(plan, keys, output, wait_for, watched)
            watched({"event": "end", "digest": summary["digest"]})
    if log_format == "text" or format == "json":
        show(summary, format, lambda: _outcome(summary, output))


def client(
    join: Annotated[Path, typer.Argument(metavar="JOIN_FILE", help="The file the server's owner gave you.")],
    data: Annotated[str, typer.Option("--data", "-d", help="Your rows: file, folder or hub id. They stay here.")],
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Recipe you agreed on; the server must use the same.")
    ] = "kilotune",
    overrides: Override = None,
    only: Annotated[
        str | None, typer.Option("--only", help="Use only rows whose field `client` has this value.")
    ] = None,
    output: Output = Path("runs/client"),
    wait: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for the server to appear.")] = 60.0,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Start from this state (`kilotune replay --checkpoint`).")
    ] = None,
    log_format: LogFormat = "text",
    format: Format = "text",
) -> None:
    """Take part in a federation with your own data; stays until the server says it is finished."""
    from kilotune.cli.display import Display

    own = [f"data.path={data}"] + ([f"data.only={only}"] if only else [])
    with Display(None, "round", quiet=log_format == "json") as screen, logged(log_format, screen) as emit:
        with loading(emit, recipe):
            from kilotune.engine.composing.compose import compose
            from kilotune.engine.deployed import join as run
        plan = compose(recipe, "federate", [*own, *(overrides or [])])
        screen.total = plan.recipe.rounds
        summary = run(plan, join, output, wait, checkpoint, emit)
    if log_format == "text" or format == "json":
        told = f"finished after round {summary['rounds']}; weights {summary['digest'][:16]}"
        show(summary, format, lambda: say(told))


def _outcome(summary: dict[str, Any], output: Path) -> None:
    from kilotune.core.units import human_bytes, human_seconds

    before, after = summary["eval"]["before"] or {}, summary["eval"]["after"]
    table(
        "held-out rows",
        ["", "before", "after"],
        [
            ["loss", number(before.get("loss")), number(after["loss"])],
            ["exact match", percent(before.get("exact_match")), percent(after["exact_match"])],
            ["ROUGE-L", percent(before.get("rouge_l")), percent(after["rouge_l"])],
            ["rows", before.get("num_examples"), after["num_examples"]],
        ],
    )
    if emulator := summary.get("eval_emulator"):
        losses = [number((emulator.get(when) or {}).get("loss")) for when in ("before", "after")]
        held = f"{summary['emulator']['held']} of {summary['emulator']['layers']} blocks"
        say(f"the clients' emulator ({held}): loss {losses[0]} before, {losses[1]} after")
    if summary["command"] == "federate":
        up, down = summary["payload_up_bytes_per_client_round"], summary["payload_down_bytes_per_client_round"]
        say(f"payload per client and round: {human_bytes(up)} up, {human_bytes(down)} down")
    if privacy := summary.get("privacy"):
        say(f"privacy of each {privacy['unit']}: epsilon {privacy['epsilon']:.3g}, delta {privacy['delta']:g}")
    say(f"peak memory {human_bytes(summary['peak_rss_bytes'])}, {human_seconds(summary['seconds'])}")
    say(f"weights {summary['digest'][:16]}, results in {output} (open {output / 'report.html'})")
