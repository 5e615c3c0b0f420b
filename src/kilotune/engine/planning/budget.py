"""Budget: which recipes and dials fit into so much memory, bytes and time, best expected quality first."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kilotune.core.errors import RecipeError
from kilotune.core.units import human_bytes, human_seconds
from kilotune.engine.composing.compose import build, override, read
from kilotune.engine.composing.plan import Plan
from kilotune.engine.planning import planner, workload
from kilotune.engine.planning.facts import Facts

__all__ = ["Budget", "parse_size", "propose"]

LADDER = "docs/byte_ladder.md, clinc150"
EXPECTED: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("fedavgm", (), f"loss 0.621 ({LADDER})"),
    ("kilotune", ("basis.size=32768", "optimizer.lr=1.7e-2"), f"loss 0.693 ({LADDER})"),
    ("kilotune", (), f"loss 0.720 ({LADDER})"),
    ("fedavg_lora", (), f"loss 0.850 ({LADDER})"),
    ("mixed", (), f"loss 0.886 ({LADDER})"),
    ("kilotune", ("basis.size=2048", "optimizer.lr=3.0e-2"), f"loss 1.086 ({LADDER})"),
    ("fed_sb", (), f"loss 1.292 ({LADDER})"),
    ("ferret", (), f"loss 1.657 ({LADDER})"),
    ("kilotune_zeroth", (), f"loss 3.455 ({LADDER})"),
    ("fedkseed_pro", (), f"loss 4.286 ({LADDER})"),
    ("fedkseed", (), f"loss 4.286 ({LADDER})"),
    ("local_lora", (), "as fedavg_lora"),
    ("local_subspace", ("basis.size=16384", "optimizer.lr=1.0e-2"), "not measured"),
    ("local_subspace", (), "not measured; as kilotune with 4,096 numbers"),
    ("local_mezo", (), "forward passes only, as kilotune_zeroth"),
)
"""Recipes and dials, best expected quality first, and what the place in this order rests on. Recipes that
send all weights are not proposed."""
MICRO_TOKENS = (1024, 512, 256, 128)
SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZES |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


@dataclass(frozen=True)
class Budget:
    """What may be used: bytes of memory, bytes up and down per client and round, minutes in all. None: any."""

    memory: int | None = None
    bytes: int | None = None
    minutes: float | None = None

    @classmethod
    def of(cls, memory: str | None, sent: str | None, minutes: float | None) -> "Budget":
        """From the words of the command line. Raises RecipeError with every mistake."""
        problems: list[str] = []
        sizes: list[int | None] = []
        for text, option in ((memory, "--max-memory"), (sent, "--max-bytes")):
            try:
                sizes.append(None if text is None else parse_size(text, option))
            except RecipeError as error:
                problems += error.problems
        if minutes is not None and not minutes > 0:
            problems.append(f"--max-minutes: got {minutes:g}, expected a number above 0.")
        if problems:
            raise RecipeError(*problems)
        return cls(sizes[0], sizes[1], minutes)

    def excess(self, predicted: dict[str, Any]) -> list[str]:
        """What goes beyond it, with both numbers."""
        found = []
        if self.memory is not None and predicted["peak_rss_bytes"] > self.memory:
            found.append(f"memory: {human_bytes(predicted['peak_rss_bytes'])}, allowed {human_bytes(self.memory)}")
        sent = wire_bytes(predicted)
        if self.bytes is not None and sent is not None and sent > self.bytes:
            found.append(f"bytes: {human_bytes(sent)} per client and round, allowed {human_bytes(self.bytes)}")
        if self.minutes is not None and predicted["seconds"] is not None and predicted["seconds"] > 60 * self.minutes:
            found.append(f"time: {human_seconds(predicted['seconds'])}, allowed {human_seconds(60 * self.minutes)}")
        return found


def parse_size(text: str, option: str) -> int:
    """Bytes in words such as 20KB (20,000) or 2GiB (2 · 2^30). Raises RecipeError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match[2].upper() if match else ""
    if match is None or unit not in SIZES or float(match[1]) == 0:
        raise RecipeError(f"{option}: got {text!r}, expected a size above 0 such as 500MB, 2GB or 2GiB.")
    return int(float(match[1]) * SIZES[unit])


def wire_bytes(predicted: dict[str, Any]) -> float | None:
    """Up and down together, or None where nothing is sent."""
    if "payload_up_bytes_per_client_round" not in predicted:
        return None
    up: float = predicted["payload_up_bytes_per_client_round"]
    return up + float(predicted["payload_down_bytes_per_client_round"])


def propose(
    recipe: str | None, assignments: list[str], clients: int | None, budget: Budget, emit: planner.Emit
) -> dict[str, Any]:
    """Every candidate's prediction, those that fit first; for the others, what is in the way.

    `recipe` None tries all recipes for a federation; a name, that recipe and its dials.
    """
    fitting: list[dict[str, Any]] = []
    failing: list[dict[str, Any]] = []
    sample: workload.Sample | None = None
    for name, dials, reason in _candidates(recipe):
        plan = _build(name, [*dials, *assignments])
        folder, facts = planner.open_facts(plan, emit)
        if sample is None:
            emit({"event": "status", "text": f"reading {plan.recipe.data.path}"})
            sample = workload.sample_rows(plan)
        figures = planner.figures_of(plan, folder, None, emit)
        entry = _best(name, [*dials, *assignments], dials, facts, sample, clients, figures, budget)
        entry["expected"] = reason
        (failing if entry["exceeds"] else fitting).append(entry)
    return {"budget": vars(budget), "fits": fitting, "exceeds": failing}


def _candidates(recipe: str | None) -> Iterator[tuple[str, tuple[str, ...], str]]:
    if recipe is None:
        yield from (entry for entry in EXPECTED if read(entry[0]).get("rounds"))
        return
    known = [entry for entry in EXPECTED if entry[0] == recipe]
    yield from known or [(recipe, (), "not measured")]


def _build(name: str, assignments: list[str]) -> Plan:
    content = override(read(name), list(assignments))
    return build(content, "tune" if content.get("steps") else "federate")


def _best(
    name: str,
    assignments: list[str],
    dials: tuple[str, ...],
    facts: Facts,
    sample: workload.Sample,
    clients: int | None,
    figures: dict[str, Any] | None,
    budget: Budget,
) -> dict[str, Any]:
    """The fastest setting of the dials that cost no quality which fits; else the one that exceeds least."""
    tried = []
    for extra in _settings(_build(name, assignments), assignments):
        plan = _build(name, [*assignments, *extra])
        load = workload.workload(plan, facts, sample, clients)
        predicted = planner.assemble(plan, facts, load, figures, times=True)
        exceeds = budget.excess(predicted)
        tried.append((len(exceeds), {"recipe": name, "set": [*dials, *extra], **predicted, "exceeds": exceeds}))
        if not exceeds:
            break
    return min(tried, key=lambda entry: (entry[0], entry[1]["peak_rss_bytes"]))[1]


def _settings(plan: Plan, assignments: list[str]) -> Iterator[list[str]]:
    """Dials in the order in which they are turned: memory first, at the price of time, then fewer local steps."""
    taken = {assignment.partition("=")[0] for assignment in assignments}
    recipe = plan.recipe
    memory: list[list[str]] = [[]]
    smaller = [t for t in MICRO_TOKENS if t < recipe.micro_batch_tokens] if "micro_batch_tokens" not in taken else []
    memory += [[f"micro_batch_tokens={tokens}"] for tokens in smaller]
    if "checkpointing" not in taken and not recipe.checkpointing and not plan.estimator.forward_only:
        memory += [[*setting, "checkpointing=true"] for setting in memory]
    if recipe.evaluation.generate and "evaluation.generate" not in taken:  # answers need more memory than small batches
        memory += [[*setting, "evaluation.generate=false"] for setting in memory]
    steps = range(recipe.local_steps, 0, -1) if recipe.rounds and "local_steps" not in taken else [recipe.local_steps]
    for count in steps:
        fewer = [f"local_steps={count}"] if count != recipe.local_steps else []
        yield from ([*setting, *fewer] for setting in memory)
