"""Facts: what a plan needs to know of a model, from its config and the headers of its weights; no weight is read."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from kilotune.core.errors import ModelError
from kilotune.engine.model.sources import check_config, tensor_places
from kilotune.engine.rows.packing import sees_whole_rows

__all__ = ["Facts", "read_facts"]

NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "inner": ("intermediate_size", "n_inner", "ffn_dim", "d_ff"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "key_heads": ("num_key_value_heads",),
    "vocabulary": ("vocab_size",),
}


@dataclass(frozen=True)
class Facts:
    """Sizes of a model. `shapes` are those of its weights by name, a tied one once."""

    shapes: dict[str, tuple[int, ...]]
    layers: int
    hidden: int
    inner: int
    vocabulary: int
    cache: int  # numbers that generation keeps per token: keys and values of all layers
    packs: bool  # rows can be laid end to end: every layer sees the whole row

    @property
    def numbers(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def largest(self) -> int:
        return max(prod(shape) for shape in self.shapes.values())


def read_facts(name: str, folder: Path) -> Facts:
    """Raises ModelError where the folder holds no model that kilotune reads."""
    check_config(name, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {**config, **(config.get("text_config") or {})}
    shapes = {name: place.shape for name, place in sorted(tensor_places(folder).items())}
    if config.get("tie_word_embeddings", True) and len(shapes) > 1:
        shapes.pop("lm_head.weight", None)
    sizes = {key: _size(name, config, key) for key in ("layers", "hidden", "vocabulary", "heads")}
    inner = _find(config, "inner") or 4 * sizes["hidden"]
    head_dim = config.get("head_dim") or sizes["hidden"] // sizes["heads"]
    key_heads = _find(config, "key_heads") or sizes["heads"]
    return Facts(
        shapes,
        sizes["layers"],
        sizes["hidden"],
        inner,
        sizes["vocabulary"],
        cache=2 * sizes["layers"] * key_heads * head_dim,
        packs=sees_whole_rows(config.get),
    )


def _find(config: dict[str, Any], key: str) -> int | None:
    return next((int(config[name]) for name in NAMES[key] if isinstance(config.get(name), int)), None)


def _size(name: str, config: dict[str, Any], key: str) -> int:
    found = _find(config, key)
    if found is None:
        names = ", ".join(NAMES[key])
        raise ModelError(f"base {name!r}: its config.json has none of {names}, so it cannot be planned.")
    return found
