"""What commands import before they need it, and that each says something before it waits. No clock is read here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.command_line import federated, kilotune

HEAVY = ("torch", "transformers", "flwr", "numba", "peft", "datasets")


@pytest.fixture(scope="module")
def planned(base, data, tmp_path_factory):
    """A cache in which a plan of the tiny model was made once; its settings."""
    home = tmp_path_factory.mktemp("cache")
    settings = federated(base, data)
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(home)
    try:
        result = kilotune("plan", "kilotune", *settings, "--format", "json").json
    finally:
        os.environ.pop("XDG_CACHE_HOME")
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before
    return home, settings, result


def imported(home: Path, *arguments: str) -> tuple[list[str], str, str]:
    """The heavy libraries that a command loads in a process of its own; its stdout and stderr."""
    program = (
        "import sys, json\n"
        "from kilotune.cli.main import main\n"
        f"sys.argv = ['kilotune', *{list(arguments)!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as ended:\n    assert not ended.code, ended.code\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))\n"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    *lines, found = done.stdout.splitlines()
    return json.loads(found), "\n".join(lines), done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("recipe", "list"), ("plan", "--help")], ids=" ".join)
def test_looking_around_imports_nothing_heavy(arguments, tmp_path):
    """Kills: `import torch` at the top of a module that every command loads."""
    assert imported(tmp_path, *arguments)[0] == []


def test_a_plan_of_a_known_model_imports_nothing_heavy(planned):
    """Kills: torch for a tensor's size, transformers for a row's tokens; a measurement that is not remembered."""
    home, settings, first = planned
    heavy, out, err = imported(home, "plan", "kilotune", *settings, "--format", "json")
    assert heavy == []
    assert json.loads(out) == first
    assert "measuring" not in err


def test_data_show_reads_tokens_without_transformers(base, data, tmp_path):
    assert imported(tmp_path, "data", "show", str(data), "--base", str(base))[0] == []


@pytest.mark.parametrize("command", ["federate", "tune", "plan", "evaluate", "chat", "replay", "export", "data show"])
def test_a_command_says_what_it_loads_before_the_first_heavy_import(command, base, data, tmp_path, monkeypatch):
    """Kills: seconds of silence while libraries are imported; progress on stdout."""
    import builtins

    def refuse(name, *rest, **options):
        if name.startswith("kilotune.engine.") and not name.endswith((".lean", ".seedfile")):
            raise KeyboardInterrupt  # here the waiting would begin
        return real(name, *rest, **options)

    real = builtins.__import__
    arguments = {
        "federate": ["federate"],
        "tune": ["tune", "local_lora"],
        "plan": ["plan"],
        "evaluate": ["evaluate", base, "-d", data],
        "chat": ["chat", base, "-p", "hello"],
        "replay": ["replay", tmp_path],
        "export": ["export", base, "-o", tmp_path / "out"],
        "data show": ["data", "show", data],
    }[command]
    monkeypatch.setattr(builtins, "__import__", refuse)
    ended = kilotune(*arguments)
    assert ended.code == 130, ended.err
    assert ended.err.startswith("loading ")
    assert ended.out == ""
