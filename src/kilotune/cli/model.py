"""Commands on a tuned model: evaluate, chat, replay, apply, merge, export."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kilotune.cli.common import Format, Template, loading, number, percent, say, show, table

Target = Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="Run folder, exported folder, seed file or base.")]
Base = Annotated[str | None, typer.Option("--base", help="Base model, when the one named by the run is elsewhere.")]
Personal = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="A client's folder, RUN/clients/NAME or its own: with what it alone has trained."),
]
Folder = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")]


def register(app: typer.Typer) -> None:
    for command in (evaluate, chat, replay, apply, merge, export):
        app.command()(command)


def evaluate(
    target: Target,
    data: Annotated[str, typer.Option("--data", "-d", help="Rows to measure on: file, folder or hub id.")],
    split: Annotated[str, typer.Option(help="Which rows: test, train, valid or all.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Rows at most, spread evenly over the clients.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Tokens generated per row; 0: loss only.")] = 48,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens per row; longer rows are cut.")] = 512,
    template: Annotated[Template | None, typer.Option(help="Layout as text; default: the run's, else chat.")] = None,
    base: Base = None,
    personal: Personal = None,
    format: Format = "text",
) -> None:
    """Measure loss, perplexity, exact match and ROUGE-L, overall and per client."""
    from kilotune.cli.display import Display

    with Display(None, "row") as emit:
        with loading(emit, target):
            from kilotune.engine.afterwards.measure import measure
        result = measure(target, data, split, limit, max_new_tokens, max_length, template, base, emit, personal)

    def text() -> None:
        rows = [["all", *_figures(result["overall"])]]
        if len(result["clients"]) > 1:
            rows += [[name, *_figures(figures)] for name, figures in result["clients"].items()]
        table(f"{target} on {data} ({split})", ["client", "rows", "loss", "perplexity", "exact match", "ROUGE-L"], rows)

    show(result, format, text)


def _figures(figures: dict[str, Any]) -> list[str]:
    return [
        str(figures["num_examples"]),
        number(figures["loss"]),
        number(figures["perplexity"], 2),
        percent(figures["exact_match"]),
        percent(figures["rouge_l"]),
    ]


def chat(
    target: Target,
    compare: Annotated[bool, typer.Option("--compare", help="Answer with the base model too, side by side.")] = False,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this once and stop.")] = None,
    system: Annotated[str | None, typer.Option(help="System turn.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer at most.")] = 200,
    base: Base = None,
    format: Format = "text",
) -> None:
    """Talk to a tuned model, in the terminal."""
    from kilotune.cli.talk import answer_once, converse

    if prompt is None and format == "json":
        raise typer.BadParameter("json needs --prompt: a conversation is no single object.", param_hint="--format")
    if prompt is not None:
        result = answer_once(target, prompt, compare, system, temperature, max_new_tokens, base)
        show(result, format, lambda: _print_answers(result))
    else:
        converse(target, compare, system, temperature, max_new_tokens, base)


def _print_answers(result: dict[str, Any]) -> None:
    if "base_answer" in result:
        table("", ["base", "tuned"], [[result["base_answer"], result["answer"]]])
    else:
        typer.echo(result["answer"])


def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder or seed file.")],
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the weights, for `kilotune client --checkpoint`.")
    ] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Check every round by itself: who counted, and whether it adds up.")
    ] = False,
    contribution: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="With --audit: what each client did for the loss on these public rows."),
    ] = None,
    base: Base = None,
    format: Format = "text",
) -> None:
    """Verify the hash chain, rebuild the weights from base and ledger, print their digest."""
    from kilotune.cli.display import Display

    if audit or contribution:
        _audit(run, contribution, base, format)
        return
    with Display(None, "round") as emit:
        with loading(emit, str(run)):
            from kilotune.engine.afterwards.measure import replay as rebuild
        result = rebuild(run, base, emit, checkpoint)
    show(
        result,
        format,
        lambda: typer.echo(f"verified {result['rounds']} rounds; weights {result['digest']}"),
    )


def _audit(run: Path, contribution: str | None, base: str | None, format: str) -> None:
    from kilotune.cli.display import Display
    from kilotune.cli.history import print_audit

    with Display(None, "round") as emit:
        with loading(emit, str(run)):
            from kilotune.engine.afterwards.audit import audit
        result = audit(run, base, emit, contribution)
    show(result, format, lambda: print_audit(result))
    if not result["verified"]:
        raise typer.Exit(1)


def apply(
    seed_file: Annotated[Path, typer.Argument(metavar="FILE.seed", help="A fine-tune in kilobytes.")],
    output: Folder,
    base: Annotated[str, typer.Option("--base", help="The base model the file was made for.")],
    format: Format = "text",
) -> None:
    """Base model + seed file = tuned model, as a Hugging Face folder."""
    say(f"reading {seed_file}")
    from kilotune.engine.afterwards.seedfile import read

    read(seed_file)  # refuses anything else before a model is loaded
    _export(str(seed_file), output, "hf", base, format)


def merge(target: Target, output: Folder, base: Base = None, format: Format = "text") -> None:
    """Fold a run's changes into its base; writes a Hugging Face folder."""
    _export(target, output, "hf", base, format)


def export(
    target: Target,
    output: Folder,
    to: Annotated[Literal["hf", "peft"], typer.Option("--to", help="hf: whole model; peft: adapter folder.")] = "hf",
    base: Base = None,
    personal: Personal = None,
    format: Format = "text",
) -> None:
    """Write a run's result for other tools."""
    _export(target, output, to, base, format, personal)


def _export(target: str, output: Path, to: str, base: str | None, format: str, personal: Path | None = None) -> None:
    from kilotune.cli.display import Display

    with Display(None, "") as emit:
        with loading(emit, target):
            from kilotune.engine.afterwards.measure import export as write
        result = write(target, output, to, base, emit, personal)
    show(
        result,
        format,
        lambda: say(f"wrote {result['folder']} (weights {result['digest'][:16]}); it was re-read and checked"),
    )
