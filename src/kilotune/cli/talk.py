"""The chat loop of `kilotune chat`."""

from typing import Any

import typer

from kilotune.cli.common import loading

Turn = dict[str, str]


def answer_once(
    target: str,
    prompt: str,
    compare: bool,
    system: str | None,
    temperature: float,
    max_new_tokens: int,
    base: str | None,
) -> dict[str, Any]:
    """One question, one answer (two with `compare`)."""
    from kilotune.cli.display import Display

    with Display(None, "") as emit:
        with loading(emit, target):
            from kilotune.engine.model.talking import Talker
        talker = Talker(target, base, compare, temperature, max_new_tokens)
    turns = [*_start(system), {"role": "user", "content": prompt}]
    result = {"prompt": prompt, "answer": "".join(talker.tuned(turns))}
    if compare:
        result["base_answer"] = "".join(talker.plain(turns))
    return result


def converse(
    target: str, compare: bool, system: str | None, temperature: float, max_new_tokens: int, base: str | None
) -> None:
    """Until end of input or an empty line twice; `/new` forgets what was said."""
    from rich.console import Console

    from kilotune.cli.display import Display

    console = Console()
    with Display(None, "") as emit:
        with loading(emit, target):
            from kilotune.engine.model.talking import Talker
        talker = Talker(target, base, compare, temperature, max_new_tokens)
    console.print("Ask away; /new starts over, Ctrl-D ends.", style="dim")
    tuned, plain = _start(system), _start(system)
    while True:
        try:
            question = console.input("[bold]you[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if question == "/new":
            tuned, plain = _start(system), _start(system)
        elif question:
            if compare:
                plain = _say(console, "base ", plain, question, talker.plain)
            tuned = _say(console, "tuned", tuned, question, talker.tuned)


def _start(system: str | None) -> list[Turn]:
    return [{"role": "system", "content": system}] if system else []


def _say(console: Any, who: str, turns: list[Turn], question: str, talk: Any) -> list[Turn]:
    turns = [*turns, {"role": "user", "content": question}]
    console.print(f"[bold cyan]{who}[/] ", end="")
    pieces = []
    for piece in talk(turns):
        pieces.append(piece)
        typer.echo(piece, nl=False)
    typer.echo("")
    return [*turns, {"role": "assistant", "content": "".join(pieces)}]
