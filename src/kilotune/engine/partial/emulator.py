"""Emulator: which blocks of a model a client holds that cannot hold it whole, and what goes with that.

With l = max(left, 1) and r = min(right, n - 1) the blocks before l and from r on are trained; of those between,
n' = round((r - l)(1 - drop)) stay, frozen, at l + int(i ((r - l) - 1) / (n' - 1)). Tensors keep the names they have in
the full model, so what was trained is put back into it by name.

Source: Xiao, Lin and Han, "Offsite-Tuning: Transfer Learning without Full Model", arXiv 2302.04870, in rounds as in
    FederatedScope-LLM (Kuang et al., arXiv 2309.00363, "FedOT"): ends averaged, emulator and plug-in both measured.
Departs: adapters on the ends are trained, not the ends, embeddings, last norm and head themselves.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kilotune.core.errors import RecipeError

if TYPE_CHECKING:
    from kilotune.engine.composing.plan import Plan
    from kilotune.engine.composing.recipe import EmulatorSection
    from kilotune.engine.planning.facts import Facts

BLOCK = re.compile(r"\.(\d+)\.")  # in a tensor's name: the first number is that of its block


@dataclass(frozen=True)
class Layout:
    """Blocks `left` to `right` - 1 of `layers` are the middle; of it only `kept` are in the emulator."""

    layers: int
    left: int
    right: int
    kept: tuple[int, ...]

    @property
    def held(self) -> int:
        """Blocks a client holds."""
        return self.left + len(self.kept) + self.layers - self.right

    def trained(self, block: int) -> bool:
        return not self.left <= block < self.right

    def dropped(self, block: int) -> bool:
        return not self.trained(block) and block not in self.kept

    def drops(self, name: str) -> bool:
        """Whether the tensor of this name is of a block that clients do not hold."""
        found = BLOCK.search(name)
        return found is not None and self.dropped(int(found[1]))


def layout(section: "EmulatorSection", layers: int) -> Layout:
    """The section's blocks in a model of so many. Raises RecipeError where the model is too small."""
    if section.right > layers:
        raise RecipeError(
            f"emulator.right: got {section.right}, but the base has {layers} blocks. Use at most {layers - 1}."
        )
    left, right = max(section.left, 1), min(section.right, layers - 1)
    if left >= right:
        raise RecipeError(
            f"emulator: left {section.left} and right {section.right} leave no middle of the base's {layers} blocks. "
            f"Use left below right, from 1 to {layers - 1}."
        )
    middle = right - left
    stay = round(middle * (1 - section.drop))
    if stay < 1:
        raise RecipeError(
            f"emulator.drop: got {section.drop}, which leaves none of {middle} blocks. Use a smaller one."
        )
    steps = max(1, stay - 1)
    return Layout(layers, left, right, tuple(left + i * (middle - 1) // steps for i in range(stay)))


# -- what it goes with ------------------------------------------------------------------------------------------------


def emulator_clashes(plan: "Plan") -> list[str]:
    """What clients with part of a model do not go with."""
    section, problems = plan.recipe.emulator, []
    if not section.active:
        return ["emulator: has no effect without left and right. Give both."] if section.align_steps else []
    if section.left >= section.right:
        problems.append(f"emulator.left: got {section.left}, expected less than emulator.right ({section.right}).")
    if plan.parametrization.writes_base:
        problems.append(
            f"emulator trains adapters on the ends, but parametrization {plan.parametrization.method_name()!r} trains "
            "the weights themselves. Use parametrization: peft."
        )
    if plan.recipe.split.enabled:
        problems.append("emulator and split are two ways to do without a whole model. Use one of them.")
    if bool(section.align_steps) != (section.align_path is not None):
        problems.append("emulator: align_steps and align_path, rows of the server, belong together. Give both or none.")
    return problems


def require_deployable(plan: "Plan", server: bool) -> None:
    """Raises RecipeError for what only a simulation does."""
    section = plan.recipe.emulator
    if section.align_steps:
        raise RecipeError(
            "emulator.align_steps: an aligned emulator is the server's alone, its clients could not make it from the "
            "base. Use --set emulator.align_steps=0 --set emulator.align_path=null, or `kilotune federate`."
        )
    if server and section.active and plan.recipe.data.eval_path is None:
        raise RecipeError(
            "data.eval_path: missing. With an emulator only the server holds the model that is measured, so it needs "
            "rows of its own. Give a file, e.g. --set data.eval_path=rows.jsonl."
        )


# -- sizes ------------------------------------------------------------------------------------------------------------


def thinned(plan: "Plan", facts: "Facts") -> "Facts":
    """The model as clients hold it; the whole one without an emulator."""
    if not plan.recipe.emulator.active:
        return facts
    blocks = layout(plan.recipe.emulator, facts.layers)
    shapes = {name: shape for name, shape in facts.shapes.items() if not blocks.drops(name)}
    return replace(facts, shapes=shapes, layers=blocks.held)


def trained_blocks(plan: "Plan", layers: int) -> list[int]:
    """Blocks that a client may change; the first one always is."""
    if not plan.recipe.emulator.active:
        return list(range(layers))
    blocks = layout(plan.recipe.emulator, layers)
    return [block for block in range(layers) if blocks.trained(block)]


def unread(plan: "Plan", name: str, folder: Path) -> set[str]:
    """Tensors of a base's files that a client of this plan never computes with."""
    from kilotune.engine.planning.facts import read_facts

    facts = read_facts(name, folder)
    return facts.shapes.keys() - thinned(plan, facts).shapes.keys()
