"""Commands on a run's history: withdraw, and the tables of an audit."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kilotune.cli.common import Format, loading, number, percent, say, show, table
from kilotune.core.errors import RecipeError


def register(app: typer.Typer) -> None:
    app.command()(withdraw)
    app.command()(unlearn)


def withdraw(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="The server's run folder; it stays as it is.")
    ] = None,
    client: Annotated[str | None, typer.Argument(metavar="[CLIENT]", help="Who leaves.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="New run folder to write.")
    ] = None,
    how: Annotated[
        Literal["subtract", "replay"],
        typer.Option(help="subtract: combine every round again without it; replay: back to before its first round."),
    ] = "subtract",
    keys: Annotated[
        Path | None, typer.Option("--keys", help="Sign with the server's key (folder of `kilotune server init`).")
    ] = None,
    exclude: Annotated[
        bool, typer.Option("--exclude", help="Only have RUN ask the client no more; works on a running server.")
    ] = False,
    certificate: Annotated[
        Path | None, typer.Option("--verify", metavar="CERTIFICATE", help="Check a certificate; with --run, a run too.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--run", metavar="DIR", help="With --verify: the run that must be what it says.")
    ] = None,
    signer: Annotated[
        str | None, typer.Option(metavar="HEX", help="With --verify: fingerprint the signing key must have.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Base model, when the one named by the run is elsewhere.")
    ] = None,
    format: Format = "text",
) -> None:
    """Take a client's part out of a finished or interrupted run, and certify it."""
    from kilotune.cli.display import Display

    if certificate is not None:
        _verify(certificate, against, signer, base, format)
        return
    if run is None or client is None or (output is None and not exclude):
        raise RecipeError("withdraw: needs RUN, CLIENT and --output, or --verify CERTIFICATE. See --help.")
    with Display(None, "") as emit:
        with loading(emit, str(run)):
            from kilotune.engine.afterwards.withdraw import exclude_live
            from kilotune.engine.afterwards.withdraw import withdraw as take_out
        if exclude:
            exclude_live(run, client)
        result = {"excluded": client, "run": str(run)} if exclude else {}
        if output is not None:
            result |= take_out(run, client, output, how, keys, base, emit)
    show(result, format, lambda: _print_withdrawal(result))


def _print_withdrawal(result: dict[str, Any]) -> None:
    if "excluded" in result:
        say(f"{result['run']} asks {result['excluded']} no more, from its next round on")
    if "output" not in result:
        return
    removed = [
        [r["round"], number(r["weight"], 4), r["num_examples"], r["payload_sha256"][:16]] for r in result["removed"]
    ]
    table(f"taken out of the run: {result['client']}", ["round", "weight", "rows", "payload"], removed)
    say(result["statement"])
    say(f"weights {result['old']['digest'][:16]} -> {result['new']['digest'][:16]}, {result['rounds']} rounds")
    say(f"{result['output']}: the new run; {result['certificate']}: signed by {result['signer']},")
    say(f"key {result['fingerprint']}")


def _verify(certificate: Path, run: Path | None, signer: str | None, base: str | None, format: str) -> None:
    from kilotune.cli.display import Display

    with Display(None, "") as emit:
        with loading(emit, str(certificate)):
            from kilotune.engine.afterwards.withdraw import verify
        result = verify(certificate, run, signer, base, emit)

    def text() -> None:
        say(f"fits: {', '.join(result['checked'])}")
        say(f"{result['client']} taken out by {result['how']} on {result['time']}; signed by {result['signer']},")
        say(f"key {result['fingerprint']}")

    show(result, format, text)


def unlearn(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of a recipe with `sharding`.")],
    rows: Annotated[str, typer.Option("--rows", "-r", metavar="FILE", help="The rows to forget, as they were given.")],
    format: Format = "text",
) -> None:
    """Forget rows exactly: delete everything that was trained on them, and serve what is left."""
    from kilotune.cli.display import Display

    with Display(None, "") as emit:
        with loading(emit, str(run)):
            from kilotune.engine.training.sharded import unlearn as forget
        result = forget(run, rows, emit)
    show(result, format, lambda: _print_unlearned(result))


def _print_unlearned(result: dict[str, Any]) -> None:
    lines = [
        [shard, " ".join(map(str, serving)) or "none: train it again", survives]
        for shard, (serving, survives) in enumerate(zip(result["serving"], result["survives"], strict=True))
    ]
    table("", ["shard", "slices that are served", "deletions it surely survives"], lines)
    say(f"{result['rows']} rows forgotten, {result['stages_deleted']} stages deleted, {result['rows_left']} rows left")
    if result["not_in_the_run"]:
        say(f"{result['not_in_the_run']} rows of the file were not in this run")
    say(f"weights {result['digest'][:16]}; run the `kilotune tune` command again to train what was deleted")


def print_audit(result: dict[str, Any]) -> None:
    """One line a round, then who counted, who did not, what does not fit, and what each client contributed."""
    columns = ["round", "clients", "up", "down", "clipped", "epsilon", "adds up", "weights"]
    table(result["run"], columns, [_round(entry) for entry in result["rounds"]])
    if who := _who(result["rounds"]):
        table("who counted", ["client", "rounds", "weight, mean", "rounds in which it was cut"], who)
    refusals = [[r["round"], x["client"], x["why"]] for r in result["rounds"] for x in r["refused"]]
    refusals += [[r["round"], "the gate", r["rejected"]] for r in result["rounds"] if r["rejected"]]
    if refusals:
        table("refused or missing, as the server recorded it", ["round", "who", "why"], refusals)
    if reasons := dict.fromkeys(entry["unchecked"] for entry in result["rounds"] if entry["unchecked"]):
        say(f"not combined again: {'; '.join(reasons)}")
    for problem in result["problems"]:
        typer.secho(f"round {problem['round']}: {problem['what']}", err=True, fg="red")
    if measured := result.get("contribution"):
        rows = sorted(measured["gain"].items(), key=lambda item: -item[1])
        title = f"loss on {measured['data']} without a client's part, minus {number(measured['loss'], 4)} with it"
        table(title, ["client", "contribution"], [[name, number(gain, 5)] for name, gain in rows])
    if result["verified"]:
        say(f"verified {len(result['rounds'])} rounds; weights {result['digest']}")


def _who(rounds: list[dict[str, Any]]) -> list[list[Any]]:
    parts: dict[str, list[dict[str, Any]]] = {}
    for entry in rounds:
        for part in entry["accepted"]:
            parts.setdefault(part["client"], []).append(part)
    return [
        [
            client,
            len(mine),
            number(sum(part["weight"] for part in mine) / len(mine), 4),
            sum("scale" in part or "limit" in part for part in mine),
        ]
        for client, mine in sorted(parts.items())
    ]


def _round(entry: dict[str, Any]) -> list[Any]:
    from kilotune.core.units import human_bytes

    def size(value: int | None) -> str:
        return "" if value is None else human_bytes(value)

    return [
        entry["round"],
        len(entry["accepted"]) or "",
        size(entry["up_bytes"]),
        size(entry["down_bytes"]),
        percent(entry["clipped_norms"]),
        number(entry["epsilon"], 3),
        {True: "yes", False: "NO", None: "?"}[entry["recombines"]],
        entry["digest"][:8],
    ]
