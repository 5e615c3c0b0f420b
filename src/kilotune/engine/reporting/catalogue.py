"""Catalogue: every method with its paper, read from docstrings."""

import inspect
import re

from kilotune.core.registry import KINDS, find, names


def catalogue() -> list[dict[str, str]]:
    """One entry per method: kind, name, summary, paper (the docstring's Source)."""
    return [_entry(kind, name) for kind in KINDS for name in names(kind)]


def _entry(kind: str, name: str) -> dict[str, str]:
    text = inspect.getdoc(inspect.getmodule(find(kind, name))) or ""
    summary = " ".join(text.split("\n\n")[0].split())
    return {"kind": kind, "name": name, "summary": summary, "paper": section(text, "Source")}


def section(text: str, word: str) -> str:
    """The paragraph of a docstring that starts with `word:`, on one line; empty when there is none."""
    match = re.search(rf"^{word}:(.*?)(?=^\w+:|^\s*$|\Z)", text, re.MULTILINE | re.DOTALL)
    return " ".join(match.group(1).split()) if match else ""
