"""Withdrawn: names of clients that a run asks no more, `withdrawn.json` in its folder.

A server at work reads it before every round, so a name that is added counts from the next round on.
"""

import json
from pathlib import Path

from kilotune.core.errors import RunError
from kilotune.engine.files import write_json

WITHDRAWN = "withdrawn.json"


def withdrawn(folder: Path) -> set[str]:
    """Who takes part no more. Raises RunError when the file is none."""
    path = folder / WITHDRAWN
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["clients"]
        if not all(isinstance(name, str) for name in names):
            raise ValueError
    except FileNotFoundError:
        return set()
    except (ValueError, LookupError, TypeError):
        raise RunError(f"{path}: cut or foreign. Restore it: it says who must not be asked.") from None
    return set(names)


def exclude(folder: Path, *clients: str) -> None:
    """Add names."""
    write_json(folder / WITHDRAWN, {"clients": sorted({*withdrawn(folder), *clients})})
