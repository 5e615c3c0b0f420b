"""Registry: a file in a kind folder is a method; its stem is its name. There is no list to keep."""

import difflib
import importlib
import pkgutil
from typing import Any

from kilotune.core.errors import RecipeError
from kilotune.core.method import Method

KINDS = (
    "parametrization",
    "basis",
    "estimator",
    "optimizer",
    "format",
    "partition",
    "codec",
    "aggregation",
    "schedule",
    "privacy",
)


def nearest(word: str, known: list[str]) -> str:
    """A hint that names the closest known word, or nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def names(kind: str) -> list[str]:
    """All method names of a kind, sorted."""
    folder = importlib.import_module(f"kilotune.{kind}").__path__
    return sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))


def find(kind: str, name: str, where: str | None = None) -> type[Any]:
    """The class behind a name. Raises RecipeError with the nearest name."""
    known = names(kind)
    if name not in known:
        place = where or f"{kind}.name"
        raise RecipeError(f"{place}: got {name!r}, expected one of {', '.join(known)}.{nearest(name, known)}")
    method: type[Method] = importlib.import_module(f"kilotune.{kind}.{name}").METHOD
    return method
