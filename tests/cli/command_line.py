"""The command line as a user meets it, in this process: arguments in; exit code, stdout and stderr out."""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from kilotune.cli.main import main


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON value on stdout; anything beside it, or a failure, is an error of the test."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1, self.out
        assert self.out.endswith("\n")
        return json.loads(self.out, parse_constant=_refuse)


def _refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def kilotune(*arguments: object) -> Ended:
    """Run `kilotune ARGUMENTS`."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with patch.object(sys, "argv", ["kilotune", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    return Ended(code, out.getvalue(), err.getvalue())


def small(base: Path, data: Path, *assignments: str) -> list[str]:
    """`--set` options that make a shipped recipe small enough for the tiny model."""
    settings = [
        f"base={base}",
        f"data.path={data}",
        "batch_size=4",
        "data.max_length=64",
        "evaluation.max_new_tokens=4",
        "threads=1",
        *assignments,
    ]
    return [word for setting in settings for word in ("--set", setting)]


def federated(base: Path, data: Path, *assignments: str) -> list[str]:
    """The default recipe, small."""
    return small(base, data, "basis.size=64", "rounds=2", "local_steps=2", *assignments)
