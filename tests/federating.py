"""Small federations for tests: a tiny model in a folder, rows of three clients, and a plan with overrides."""

import json
from copy import deepcopy
from functools import cache
from pathlib import Path

from kilotune.engine.composing.compose import build, override
from kilotune.engine.composing.compose import read as read_recipe
from kilotune.engine.composing.plan import Plan
from kilotune.engine.model.base import load_base
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rounds.worker import Worker
from kilotune.engine.session import encode_rows, evaluator, header, split_rows
from tiny import save_tiny

CLIENTS = ("ada", "bob", "cyd")
WORDS = ("on", "off", "up", "down", "hot", "cold")


def write_rows(path: Path, per_client: int = 12, clients: tuple[str, ...] = CLIENTS) -> Path:
    """Each client has its own requests; the answers are a word or two."""
    lines = []
    for c, client in enumerate(clients):
        for n in range(per_client):
            row = {
                "client": client,
                "instruction": f"{client} {WORDS[n % 6]} {n}",
                "input": "",
                "output": f"{WORDS[(n + c) % 6]}{c}",
                "task": WORDS[n % 3],
                "split": "test" if n % 4 == 3 else "train",
            }
            lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


read = cache(read_recipe)


def content(base: Path, data: Path, recipe: str = "kilotune", *assignments: str) -> dict:
    """A shipped recipe, made small enough for the tiny model."""
    small = [
        f"base={base}",
        f"data.path={data}",
        "batch_size=4",
        "evaluation.generate=false",
        "data.max_length=64",
        "threads=1",  # several tests run at once
    ]
    raw = deepcopy(read(recipe))
    if "basis" in raw:
        small.append("basis.size=64")
    if "sharding" in raw:
        small.append("sharding.slices=2")  # the tiny model has two layers
    if "split" in raw:
        small += ["split.lower=0", "parametrization.tail=1", "split.shortcut_steps=2"]  # ditto
    if "emulator" in raw:
        small += [f"base={deeper(base)}", "emulator.left=1", "emulator.right=5", "emulator.drop=0.5"]
    if "partition" in raw:
        small.append("partition=null")  # the rows' own three clients
    if "rounds" in raw:
        small += ["rounds=2", "local_steps=2"]
    else:
        small += ["steps=4"] + (["local_steps=2"] if "basis" in raw else [])
    return override(raw, [*small, *assignments])


def deeper(base: Path) -> Path:
    """The tiny model with six layers, beside it."""
    folder = base.parent / "deeper"
    return folder if folder.exists() else save_tiny(folder, num_hidden_layers=6)


def plan(base: Path, data: Path, recipe: str = "kilotune", *assignments: str) -> Plan:
    raw = content(base, data, recipe, *assignments)
    return build(raw, "tune" if raw.get("steps") else "federate")


def quiet(event: dict) -> None:
    """An `emit` for runs nobody watches."""


def independent(
    name: str, recipe: Plan, base: Path, folder: Path, checkpoint: Path | None = None, whole: bool = True
) -> Worker:
    """A client as a process of its own would be: own base, own replica, keeps what it receives."""
    loaded = load_base(str(base), writable=whole)
    rows = split_rows(recipe, alone=False).clients[name]
    replica = Replica(loaded, recipe, whole)
    examples = encode_rows(recipe, loaded, rows, name, quiet)
    genesis = header(recipe, loaded).hash
    return Worker(
        name,
        replica,
        genesis,
        examples,
        [],
        evaluator(recipe, quiet),
        folder / name,
        keeps_rounds=True,
        checkpoint=checkpoint,
    )
