"""Imports point one way: cli → engine → kind folders → core; heavy libraries stay where they belong."""

import ast
from functools import cache
from pathlib import Path

import pytest

from kilotune.core.registry import KINDS

SOURCE = Path(__file__).parent.parent / "src" / "kilotune"
FILES = sorted(path for path in SOURCE.rglob("*.py"))
LAYERS = {"core": 0, **dict.fromkeys(KINDS, 1), "engine": 2, "cli": 3}
HOMES = {
    "peft": ("parametrization/peft.py", "engine/model/export.py"),
    "flwr": ("engine/flower/",),
    "typer": ("cli/",),
    "transformers": ("engine/",),
}
SLOW = {"torch", "transformers", "flwr", "peft", "numba", "datasets", "numpy"}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path, top_level_only: bool = False) -> list[str]:
    """Full names of the modules a file imports."""
    tree = parsed(path)
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


def folder_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0]


def test_imports_point_down_and_kinds_never_meet():
    """Kills: a kind that imports the engine or another kind; core that imports anything above it."""
    for path in FILES:
        home = folder_of(path)
        for name in imports(path) if home in LAYERS else ():
            other = name.split(".")[1] if name.startswith("kilotune.") else home
            if other in LAYERS and other != home:
                assert LAYERS[other] < LAYERS[home], f"{path.relative_to(SOURCE)} imports {name}"


def test_no_modules_import_one_another_in_a_circle():
    """Type checking and imports within functions count. Kills: two files that can only be understood together."""
    left = {module_of(path): modules(path) for path in FILES}
    while free := [name for name, others in left.items() if not any(other in left for other in others)]:
        for name in free:
            del left[name]
    assert not left, f"in a circle, or above one: {', '.join(sorted(left))}"


def module_of(path: Path) -> str:
    return ".".join(("kilotune", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


def modules(path: Path) -> list[str]:
    """Modules of the project that a file imports."""
    return [name for name in (*imports(path), *imported_names(path)) if name in KNOWN and name != module_of(path)]


def imported_names(path: Path) -> list[str]:
    """What follows `from ... import`, with its package: names of modules, and of much else."""
    nodes = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom) and node.module]
    return [f"{node.module}.{alias.name}" for node in nodes for alias in node.names]


KNOWN = {module_of(path) for path in FILES}


def test_each_heavy_library_has_one_home():
    """Kills: flwr or peft leaking through the code base, which makes a new version of either a big change."""
    for path in FILES:
        place = str(path.relative_to(SOURCE))
        for name in imports(path):
            homes = HOMES.get(name.split(".")[0])
            assert homes is None or place.startswith(homes), f"{place} imports {name}, whose home is {homes}"


@pytest.mark.parametrize("path", [p for p in FILES if folder_of(p) == "cli"], ids=lambda p: p.name)
def test_the_command_line_starts_without_heavy_imports(path):
    """Kills: `kilotune --help` that waits for torch."""
    for name in imports(path, top_level_only=True):
        assert name.split(".")[0] not in SLOW, f"{path.name} imports {name} at the top"
        assert not name.startswith("kilotune.engine"), f"{path.name} imports {name} at the top"
