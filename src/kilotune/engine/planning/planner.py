"""Planner: bytes by formula, memory and time from figures of a slice of the model — before a run starts.

Neither torch nor transformers is imported when the figures are in the cache: sizes come from the headers of the
weights, tokens from a sample of the rows.
"""

from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

from kilotune.engine.composing.compose import for_group
from kilotune.engine.composing.pairs import numbers_down, rank
from kilotune.engine.composing.plan import Plan
from kilotune.engine.composing.portions import numbers_up
from kilotune.engine.memory import check_memory
from kilotune.engine.model import sources
from kilotune.engine.partial.emulator import thinned, trained_blocks
from kilotune.engine.partial.split import predicted_bytes
from kilotune.engine.planning import slices
from kilotune.engine.planning.facts import Facts, read_facts
from kilotune.engine.planning.workload import Workload, planned_steps, sample_rows, workload
from kilotune.engine.rounds.ledger import MEMBERS_BYTES
from kilotune.engine.secure import costs

__all__ = [
    "assemble",
    "figures_of",
    "memory_bytes",
    "open_facts",
    "payload_bytes",
    "predict",
    "step_seconds",
]

FLOAT = 4
EVALUATION_TOKENS = 4096  # of one batch, as `evaluate` cuts them
ANSWER_TOKENS = 8192  # of prompts and answers at once, as `generate` cuts them
CHUNK_NUMBERS = 1 << 24  # logits alive at once
LOOSE = 1.1  # what an allocator holds beyond what was asked for, where many sizes come and go
IDLE_BYTES = 420 << 20  # of a process that has loaded its libraries, where it was not measured
KEPT_PER_HIDDEN = 34  # float32 numbers per token, layer and hidden unit; Korthikanti et al. 2205.05198, eq. 1
MEASURES = 5.5  # two-point steps that a measurement of the curvature costs (11 passes)
Emit = Callable[[dict[str, Any]], None]


def predict(plan: Plan, clients: int | None, probe: bool | None, emit: Emit = lambda event: None) -> dict[str, Any]:
    """Payload bytes per client and round, peak resident bytes of one process, seconds per step and in all.

    `probe` True measures anew; None measures what was never measured here; False measures nothing and gives no times.
    """
    folder, facts = open_facts(plan, emit)
    load = workload(plan, facts, sample_rows(plan), clients)
    return assemble(plan, facts, load, figures_of(plan, folder, probe, emit), times=probe is not False)


def _adapts(plan: Plan) -> bool:
    """Whether what is trained are tensors that the base does not have."""
    return not plan.parametrization.writes_base


def open_facts(plan: Plan, emit: Emit) -> tuple[Path, Facts]:
    """The base's folder and sizes. Raises ModelError when it would not fit in memory."""
    name = plan.recipe.base
    folder = sources.find_folder(name, None, None, lambda text: emit({"event": "status", "text": text}))
    check_memory(name, sources.float32_bytes(folder))
    return folder, read_facts(name, folder)


def figures_of(plan: Plan, folder: Path, probe: bool | None, emit: Emit) -> slices.Figures | None:
    """Remembered or measured; an adapter has to be counted in any case."""
    found = slices.remembered_figures(plan, folder) if not probe else None
    if found is None and (probe is not False or _adapts(plan)):
        parts = f"{plan.parametrization.method_name()} and {plan.estimator.method_name()}"
        emit({"event": "status", "text": f"measuring {parts} on a slice of {plan.recipe.base}, once on this machine"})
        found = slices.figures(plan, folder)
    return found


def assemble(plan: Plan, facts: Facts, load: Workload, figures: slices.Figures | None, times: bool) -> dict[str, Any]:
    """The prediction from its parts."""
    numel = wire_numbers(plan, facts, figures)
    result: dict[str, Any] = {
        "recipe_id": plan.id,
        "base": plan.recipe.base,
        "clients": load.clients,
        "trainable": sum(numel.values()),
        "seconds_per_step": None,
        "seconds": None,
    }
    if plan.recipe.rounds is not None:
        result |= payload_bytes(plan, numel, load.clients, load.row)
    result["peak_rss_bytes"] = memory_bytes(plan, facts, numel, load, figures)
    if plan.recipe.emulator.active:
        result["client_peak_rss_bytes"] = memory_bytes(plan, facts, numel, load, figures, client=True)
    if figures is not None and times:
        seconds = step_seconds(plan, facts, load, figures)
        taking_part = min(load.clients, getattr(plan.schedule, "clients_per_round", load.clients))
        result |= {"seconds_per_step": seconds, "seconds": seconds * planned_steps(plan, taking_part)}
        if plan.recipe.secure_aggregation.enabled:
            result["secure_seconds_per_round"] = costs.seconds(plan, numel, taking_part)
            result["seconds"] += result["secure_seconds_per_round"] * (plan.recipe.rounds or 0)
    return result


# -- numbers that are sent ---------------------------------------------------------------------------------------------


def wire_numbers(plan: Plan, facts: Facts, figures: slices.Figures | None) -> dict[str, int]:
    """Numbers of each tensor that is trained and sent."""
    if plan.parametrization.uses_basis and plan.basis is not None:
        return {"coords": plan.basis.size}
    if (known := plan.parametrization.numbers(facts.shapes, facts.hidden)) is not None:
        return known
    if figures is None:
        raise ValueError("an adapter is counted on a slice, so its figures are needed")
    small, large = figures["wire"][str(slices.SMALL)], figures["wire"][str(slices.LARGE)]
    added = {name: size for name, size in large.items() if name not in small}  # of the layers beyond the first
    layers = {name: size for name, size in added.items() if f".{slices.LARGE - 1}." in name}
    numel = dict(small)
    for layer in trained_blocks(plan, facts.layers)[slices.SMALL :]:
        numel |= {name.replace(f".{slices.LARGE - 1}.", f".{layer}.", 1): size for name, size in layers.items()}
    return numel


# -- bytes ------------------------------------------------------------------------------------------------------------


def payload_bytes(plan: Plan, numel: dict[str, int], clients: int, row: float | None = None) -> dict[str, float]:
    """Means per client and round over a whole run, as the summary counts them. `row`: tokens of a row, on which hangs
    what clients without a body send; unknown, the most it may have make a bound."""
    size, steps = plan.num_directions, plan.recipe.local_steps
    plans = [for_group(plan, i) for i in range(-1, len(plan.recipe.clients))]
    groups = [plan.group_at((i + 0.5) / clients) for i in range(clients)]
    shares = [groups.count(i) / clients for i in range(-1, len(plan.recipe.clients))]
    bound = plan.uplink.method_name() == "projection"  # its budgets follow the norms of the change: an upper bound
    up = sum(
        share * p.uplink.predict_bytes(numbers_up(plan, p, numel), 0 if bound else p.recipe.local_steps)
        for share, p in zip(shares, plans, strict=True)
    )
    taking_part = min(clients, getattr(plan.schedule, "clients_per_round", clients))
    lists = 1 if plan.recipe.shared_directions else taking_part
    pairs = 0.0 if bound or not size else size * (1 - (1 - 1 / size) ** (steps * lists))  # distinct directions
    if plan.privacy is not None and plan.privacy.unit == "client":
        pairs = size  # noise moves along every direction
    if "apart" in plan.downlink.traits:
        pairs = steps * taking_part
    ranks = taking_part * sum(share * rank(p) for share, p in zip(shares, plans, strict=True))
    combined = numbers_down(plan, numel, ranks)
    record = MEMBERS_BYTES + plan.downlink.predict_bytes(combined, round(pairs))
    down = record * clients / taking_part  # in the end everybody holds every round
    if plan.aggregation.method_name() == "seed_sum" and getattr(plan.aggregation, "selection", "") == "amplitude":
        down += 2 * size
    for share, p in zip(shares, plans, strict=True):
        beside_up, beside_down = predicted_bytes(p, numel, row)
        up, down = up + share * beside_up, down + share * beside_down
    up, down, added = costs.masked(plan, numel, taking_part, up, down)
    sent = {"payload_up_bytes_per_client_round": round(up, 1), "payload_down_bytes_per_client_round": round(down, 1)}
    return sent | added


# -- memory -----------------------------------------------------------------------------------------------------------


def memory_bytes(
    plan: Plan,
    facts: Facts,
    numel: dict[str, int],
    load: Workload,
    figures: slices.Figures | None,
    client: bool = False,
) -> int:
    """Peak resident bytes of one process: what stays, and the largest of what comes and goes beside it. `client`: of
    one that holds an emulator only, and measures and writes nothing."""
    held = thinned(plan, facts)
    idle = IDLE_BYTES if figures is None else figures["idle_bytes"]
    trained, federated = sum(numel.values()), plan.recipe.rounds is not None
    outer = plan.server_optimizer
    moments = (plan.optimizer.copies + outer.public_copies + (0 if client else outer.copies)) * trained
    stays = (held if client else facts).numbers + moments + _copies(plan, facts, trained, federated)
    if _adapts(plan):
        stays += trained
    training = _training(plan, held, trained, load, figures)
    saving = _export_bytes(plan, trained) if federated else 0
    passing = max(training, 0 if client else FLOAT * _evaluation(plan, facts, load), saving)
    # An adapter is written, and read back over a base mapped once more, while the allocator still holds the rest.
    proving = facts.numbers if "adapter" in plan.parametrization.gives and not client else 0
    return int(idle + FLOAT * (stays + proving) + passing)


def _copies(plan: Plan, facts: Facts, trained: int, federated: bool) -> int:
    """Numbers kept beside the weights to go back to, or to take a difference from."""
    if plan.parametrization.uses_basis:
        one_pass = plan.basis is not None and plan.basis.one_pass
        return 0 if plan.estimator.forward_only and one_pass else facts.numbers
    return trained if federated else 0


def _training(plan: Plan, facts: Facts, trained: int, load: Workload, figures: slices.Figures | None) -> float:
    """Bytes that come and go within a step."""
    head = facts.vocabulary * facts.hidden
    logits = 2 * min(CHUNK_NUMBERS, load.labels * facts.vocabulary)
    if plan.estimator.forward_only:
        sides = 2 if load.peak_tokens <= 1024 else 1  # short batches see both probes at once
        return FLOAT * (logits + sides * (_forward(facts, load.peak_tokens) + facts.inner * facts.hidden))
    per_layer = KEPT_PER_HIDDEN * facts.hidden * FLOAT if figures is None else figures["layer_token_bytes"]
    rest = 0.0 if figures is None else figures["rest_token_bytes"]
    again = int(plan.recipe.checkpointing * facts.layers)
    whole_layers = min(facts.layers, facts.layers - again + 1)  # one at a time is made again
    kept = load.peak_tokens * (FLOAT * facts.hidden * again + per_layer * whole_layers + rest)
    whole = plan.parametrization.uses_basis or plan.parametrization.method_name() == "full"
    gradients = head if whole else 0  # the head's is made with its loss and waits for the embedding's
    piled_up = trained if plan.parametrization.method_name() == "full" and max(map(len, load.steps)) > 1 else 0
    early = kept + FLOAT * (gradients + logits + piled_up)
    late = FLOAT * (3 * gradients + piled_up)
    return max(early, late)


def _forward(facts: Facts, tokens: float) -> float:
    """Numbers alive within one layer of a pass without gradients."""
    return tokens * (6 * facts.hidden + 3 * facts.inner)


def _evaluation(plan: Plan, facts: Facts, load: Workload) -> float:
    """Numbers that come and go while held-out rows are measured."""
    settings = plan.recipe.evaluation
    if not load.held_out:
        return 0.0
    answers = settings.max_new_tokens if settings.generate else 0
    row = load.prompt + answers
    rows = min(load.held_out, max(1, ANSWER_TOKENS // max(1, round(row)))) if answers else 0
    loss = _forward(facts, min(EVALUATION_TOKENS, load.held_out * load.longest)) + 3 * CHUNK_NUMBERS
    generation = LOOSE * facts.cache * rows * row + _forward(facts, rows * load.prompt) + rows * facts.vocabulary
    return max(loss, generation)


def _export_bytes(plan: Plan, trained: int) -> int:
    """What making a payload holds at once beyond training: the difference, and its encoding."""
    return (FLOAT + 2) * trained if not plan.parametrization.uses_basis else 0


# -- time -------------------------------------------------------------------------------------------------------------


def step_seconds(plan: Plan, facts: Facts, load: Workload, figures: slices.Figures) -> float:
    """Seconds of a step, mean over the sampled ones."""
    facts, total = thinned(plan, facts), 0.0
    # A second forward pass: half of what both took where weights have no gradients, else a third.
    again = 1 + plan.recipe.checkpointing * (1 / 2 if _adapts(plan) else 1 / 3)
    for step in load.steps:
        tokens = sum(step)
        total += again * facts.layers * (len(step) * figures["layer_s"] + tokens * figures["layer_token_s"])
        total += figures["rest_s"] + tokens * figures["rest_token_s"]
    seconds = total / len(load.steps) + load.labels * figures["label_s"]
    if plan.optimizer.lr == "auto":  # the curvature is measured at the first step and then now and again
        every = getattr(plan.estimator, "probe_every", 1)
        steps = (plan.recipe.rounds or 0) * plan.recipe.local_steps or plan.recipe.steps or 1
        seconds *= 1 + MEASURES * ceil(steps / every) / steps
    return seconds
