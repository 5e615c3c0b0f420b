"""README's commands run as they stand there, on the tiny model; and what it says about files is true."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from federating import CLIENTS, write_rows
from kilotune.cli.main import app
from kilotune.engine.planning import slices
from tiny import save_tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = ["batch_size=4", "evaluation.generate=false", "data.max_length=64"]


def commands() -> list[list[str]]:
    """Every `$ kilotune ...` line of README's console blocks, as words, in order."""
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    lines = [line[2:].split(" #")[0] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [shlex.split(line) for line in lines if line.startswith("kilotune")]


def test_readme_names_the_two_commands_and_every_folder_it_links():
    """Kills: a link to a page that was renamed; a target that the Makefile does not have."""
    for target in re.findall(r"\$ make (\w+)", README):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), target
    for link in re.findall(r"\]\((\w[^)#:]*)\)", README):
        assert (ROOT / link).exists(), link


def test_every_command_of_readme_runs(tmp_path, monkeypatch):
    """Kills: an option that was renamed; a command that only works on the author's machine.

    The tiny model stands in for the embedded one, and a few steps and rounds for many; words and order are README's.
    Server and clients, which wait for each other, run in tests/engine/test_deployed.py.
    """
    monkeypatch.chdir(tmp_path)
    for name, few in {"TRIES": 1, "SHORT": 64, "LONG": 128, "FEW": 8, "MANY": 32}.items():
        monkeypatch.setattr(slices, name, few)  # how much is measured before a plan
    base = save_tiny(tmp_path / "tiny")
    write_rows(tmp_path / "my_rows.jsonl")
    runner = CliRunner()
    ran = []
    for _, *words in commands():
        verb = words[0]
        if verb == "client" or words[:2] == ["server", "run"]:
            continue
        words = [str(base) if word == "smollm2-135m" else word for word in words]
        if verb in ("plan", "federate", "tune"):
            small = [f"base={base}", *SMALL, "local_steps=1"]
            small += ["basis.size=64"] if verb != "tune" and words[1] == "kilotune" else []  # others may have no basis
            small += {"federate": ["rounds=2"], "tune": ["steps=4"], "plan": ["micro_batch_tokens=256"]}.get(verb, [])
            words += [word for setting in small for word in ("--set", setting)]
        if verb == "data":
            words += ["--base", str(base)]
        if verb == "chat":
            words += ["--prompt", "ada on 1", "--max-new-tokens", "3"]
        if verb == "withdraw":
            words[2] = CLIENTS[-1]
        if verb == "evaluate":
            words += ["--max-new-tokens", "0"]
        result = runner.invoke(app, words)
        assert result.exit_code == 0, f"{' '.join(words)}\n{result.output}\n{result.exception!r}"
        ran.append(verb)
    assert {
        "recipe",
        "data",
        "plan",
        "federate",
        "tune",
        "evaluate",
        "chat",
        "replay",
        "apply",
        "export",
        "doctor",
        "withdraw",
    } <= set(ran)
    assert (tmp_path / "tuned" / "model.safetensors").exists()
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:docs|tests|src|benchmarks)/[\w./-]+\.\w+)`", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_the_page_of_papers_is_what_recipes_and_docstrings_say():
    """Kills: a method without a row; a row without a source."""
    from kilotune.engine.reporting.catalogue import catalogue
    from kilotune.engine.reporting.papers import papers_page

    assert (ROOT / "docs" / "papers.md").read_text(encoding="utf-8") == papers_page(ROOT), "run `make docs`"
    assert [entry["name"] for entry in catalogue() if not entry["paper"]] == []
