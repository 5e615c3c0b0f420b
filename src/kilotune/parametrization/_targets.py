"""Which tensors a parametrization covers: `all`, or patterns that match parts of tensor names."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from kilotune.core.errors import RecipeError
from kilotune.core.registry import nearest

if TYPE_CHECKING:
    from torch import nn


def select(names: list[str], targets: str | tuple[str, ...], where: str = "parametrization.targets") -> list[str]:
    """Names covered by the patterns, sorted.

    A pattern without a star matches a whole dotted part ("q_proj", "layers.3"); with one, the whole
    name ("model.layers.*.mlp.*"). Raises RecipeError for a pattern that matches nothing.
    """
    if targets == "all":
        return sorted(names)
    chosen: set[str] = set()
    for pattern in (targets,) if isinstance(targets, str) else targets:
        found = [n for n in names if _matches(n, pattern)]
        if not found:
            parts = sorted({part for n in names for part in n.split(".")})
            raise RecipeError(f"{where}: {pattern!r} matched none of {len(names)} tensors.{nearest(pattern, parts)}")
        chosen.update(found)
    return sorted(chosen)


def _matches(name: str, pattern: str) -> bool:
    if "*" in pattern:
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def parameters(model: nn.Module, targets: str | tuple[str, ...] = "all") -> dict[str, nn.Parameter]:
    """Selected parameters by name, sorted; a tied tensor appears once, under its first name."""
    by_name = dict(model.named_parameters())
    return {name: by_name[name] for name in select(list(by_name), targets)}
