"""Stages: the files of a run with sharding, and which rows each of them has seen."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kilotune.core.errors import RunError
from kilotune.engine.composing.plan import Plan
from kilotune.engine.files import read_tensors, write_json, write_tensors
from kilotune.engine.training.shards import Order, cyclic_orders

SLICES, STAGES = "slices.json", "stages"
Tensors = dict[str, Tensor]


@dataclass
class Manifest:
    """Where every row of a run is, and what was forgotten."""

    recipe: dict[str, Any]  # as it was asked for; recipe.yaml says what is served
    base_digest: str
    rows: dict[str, tuple[int, int]]  # id -> (shard, slice)
    forgotten: list[str]

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises RunError when the folder is none of a sharded run."""
        path = folder / SLICES
        if not path.exists():
            raise RunError(f"{folder}: no {SLICES} there: rows can be forgotten exactly only from a run with sharding.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content["rows"] = {str(row): (int(at[0]), int(at[1])) for row, at in content["rows"].items()}
            return cls(**content)
        except (ValueError, TypeError, LookupError):
            raise RunError(f"{path}: cut or foreign. Restore it from a backup.") from None

    def write(self, folder: Path) -> None:
        write_json(folder / SLICES, {**vars(self), "forgotten": sorted(self.forgotten)})

    def digest(self, shard: int, order: Order) -> str:
        """Over the ids of all rows of these slices, which is all that a stage hangs on beside the recipe."""
        members = sorted(row for row, at in self.rows.items() if at[0] == shard and at[1] in order)
        return hashlib.sha256(json.dumps([shard, order, members]).encode()).hexdigest()


class Stages:
    """The stage files of a run."""

    def __init__(self, folder: Path, plan: Plan, manifest: Manifest) -> None:
        self._folder, self._manifest = folder / STAGES, manifest
        section = plan.recipe.sharding
        self.orders = cyclic_orders(section.slices, section.orders or section.slices)
        self.shards = range(section.shards)

    def path(self, shard: int, order: Order) -> Path:
        return self._folder / str(shard) / ("-".join(map(str, order)) + ".safetensors")

    def holds(self, shard: int, order: Order) -> bool:
        """Whether this stage was trained, on the very rows that are its slices' now."""
        path = self.path(shard, order)
        return path.exists() and read_tensors(path)[1].get("rows") == self._manifest.digest(shard, order)

    def write(self, shard: int, order: Order, tensors: Tensors) -> None:
        write_tensors(self.path(shard, order), tensors, {"rows": self._manifest.digest(shard, order)})

    def best(self, shard: int) -> Order:
        """The longest order, from its start, of which every stage is there."""
        standing = [self._standing(shard, order) for order in self.orders]
        return max(standing, key=len)

    def _standing(self, shard: int, order: Order) -> Order:
        length = 0
        while length < len(order) and self.holds(shard, order[: length + 1]):
            length += 1
        return order[:length]

    def tensors(self, shard: int, order: Order) -> Tensors:
        """What the stages of an order have trained."""
        return {k: v for n in range(len(order)) for k, v in read_tensors(self.path(shard, order[: n + 1]))[0].items()}

    def drop(self, shard: int, slices: set[int]) -> int:
        """Delete every stage that has seen one of these slices; returns how many."""
        seen = [path for path in (self._folder / str(shard)).glob("*.safetensors") if _order_of(path) & slices]
        for path in seen:
            path.unlink()
        return len(seen)


def _order_of(path: Path) -> set[int]:
    return {int(number) for number in path.stem.split("-")}
