"""Shards and slices: which row trains which layers, in which orders, and what is left after a deletion.

A row belongs to one slice of one shard, by a hash of its own content, so that no row's place depends on another row.
Layer group i of an order, the topmost layers first, is trained on the order's first i slices, everything else frozen.
What stands after i slices of an order is a function of these slices alone; deleting a row leaves the part of each
order before the row's slice as it is.

Source: Basu Roy Chowdhury et al., "Towards Scalable Exact Machine Unlearning Using Parameter-Efficient Fine-Tuning"
    (S3T), arXiv 2406.16257.
Departs: layers are matched by their number, not by a part of their name, where "layers.3" would also mean 30 to 39.
    Orders for known deletion probabilities (maximum-weight matching) are left out: all rows are alike.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kilotune.core.errors import RecipeError
from kilotune.core.rng import derive

if TYPE_CHECKING:
    from kilotune.engine.composing.plan import Plan
    from kilotune.engine.rows.data import Row

Order = tuple[int, ...]
LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")


PLAIN = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern")
"""Keys of a LoRA configuration that make of it more than equal pairs of factors."""


def sharding_clashes(plan: "Plan") -> list[str]:
    """What of a recipe does not fit its `sharding`."""
    section, problems = plan.recipe.sharding, list[str]()
    if not section.slices:
        return problems
    found = plan.parametrization.method_name()
    config = getattr(plan.parametrization, "config", {})
    more = any(config.get(key) for key in PLAIN) or bool(getattr(plan.parametrization, "freeze", ()))
    if found != "peft" or getattr(plan.parametrization, "method", "") != "lora" or more:
        problems.append(
            f"sharding: trains plain LoRA by layers, got parametrization {found!r}. "
            "Use parametrization: {name: peft, method: lora} without " + ", ".join((*PLAIN, "freeze")) + "."
        )
    if (plan.recipe.steps or 0) % section.slices:
        problems.append(
            f"steps: got {plan.recipe.steps}, expected a multiple of sharding.slices ({section.slices}): they are "
            "shared out to the stages."
        )
    return problems


def row_id(row: "Row") -> str:
    """16 hex digits of what a row says; equal rows have equal ids and are deleted together."""
    return hashlib.sha256(json.dumps(row.record, sort_keys=True, default=str).encode()).hexdigest()[:16]


def place(row: str, seed: int, num_shards: int, num_slices: int) -> tuple[int, int]:
    """(shard, slice) of a row id."""
    number = derive(seed, "slice", row) % (num_shards * num_slices)
    return number // num_slices, number % num_slices


def cyclic_orders(num_slices: int, count: int) -> list[Order]:
    """`count` different orders of all slices, their starts as different as can be.

    The first `num_slices` are the rotations of (0, 1, ...), so that each slice comes once at each position; then the
    same for what follows the first slice, and so on.
    """
    wanted = min(count, _factorial(num_slices))
    orders, depth = [tuple(range(num_slices))], 0
    while len(orders) < wanted:
        span = num_slices - depth
        orders = [o[:depth] + _rotated(o[depth:], by) for by in range(span) for o in orders]
        depth += 1
    return orders[:wanted]


def stage_orders(orders: Sequence[Order]) -> list[Order]:
    """The stages of these orders, shorter ones first, each once: orders that begin alike share their first stages."""
    depths = range(1, len(orders[0]) + 1)
    return list(dict.fromkeys(order[:depth] for depth in depths for order in orders))


def seen_slices(plan: "Plan", order: Order) -> Order:
    """The slices whose rows the last stage of this order is trained on."""
    return order if plan.recipe.sharding.cumulative else order[-1:]


def stage_steps(plan: "Plan", rows: Iterable["Row"]) -> int:
    """Optimizer steps until every stage of every shard is trained on these rows; a stage without rows takes none."""
    section = plan.recipe.sharding
    filled = {place(row_id(row), plan.recipe.seed, section.shards, section.slices) for row in rows}
    stages = stage_orders(cyclic_orders(section.slices, section.orders or section.slices))
    trained = sum(
        any((shard, piece) in filled for piece in seen_slices(plan, order))
        for shard in range(section.shards)
        for order in stages
    )
    return trained * ((plan.recipe.steps or 0) // section.slices)


def _rotated(order: Order, by: int) -> Order:
    return order[by:] + order[:by]


def _factorial(number: int) -> int:
    return 1 if number < 2 else number * _factorial(number - 1)


def surely_survives(orders: Sequence[Order], deleted: Iterable[int] = ()) -> int:
    """How many more deleted slices, whichever they are, leave a prefix: the slices that still begin an order, less
    one. An order is lost for good when its first slice is."""
    gone = set(deleted)
    return max(0, len({order[0] for order in orders} - gone) - 1)


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor is part of."""
    found = LAYER.search(name)
    return int(found.group(1)) if found else None


def layer_groups(names: Iterable[str], num_slices: int) -> list[list[str]]:
    """The tensors of each stage: the topmost layers for the first, and what does not divide evenly for the last.

    Raises RecipeError when there are fewer layers than slices. Tensors of no layer are in no group.
    """
    by_layer: dict[int, list[str]] = {}
    for name in sorted(names):
        number = layer_of(name)
        if number is not None:
            by_layer.setdefault(number, []).append(name)
    if len(by_layer) < num_slices:
        raise RecipeError(
            f"sharding.slices: got {num_slices}, expected at most {len(by_layer)}, one for each layer that is trained. "
            "Use fewer slices, or more shards."
        )
    layers, size = sorted(by_layer, reverse=True), len(by_layer) // num_slices
    cuts = [stage * size for stage in range(num_slices)] + [len(layers)]
    return [
        [name for layer in layers[start:end] for name in by_layer[layer]] for start, end in itertools.pairwise(cuts)
    ]
