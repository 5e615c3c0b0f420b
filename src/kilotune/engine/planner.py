"""Planner: bytes by formula, memory by formula or probe, time by one probe step — before a run starts."""

import math
import time
from dataclasses import dataclass
from typing import Any

import psutil

from kilotune.aggregation.seed_sum import SeedSum
from kilotune.core.rng import stream
from kilotune.engine.batches import micro_batches
from kilotune.engine.compose import Plan
from kilotune.engine.compute import Compute
from kilotune.engine.evaluation import evaluate
from kilotune.engine.models import Base, load_base
from kilotune.engine.replica import Replica
from kilotune.engine.session import encode_rows, split_rows
from kilotune.engine.step import BatchObjective, Memory, train_step
from kilotune.engine.tokenize import Example
from kilotune.engine.worker import MEMBERS_BYTES, peak_rss

FLOAT = 4
ACTIVATIONS_PER_HIDDEN = (
    34  # float32 numbers kept per token, layer and hidden unit; Korthikanti et al. 2205.05198, eq. 1
)


@dataclass(frozen=True)
class Workload:
    """What a recipe will run on: clients, and their longest rows for a worst-case step."""

    clients: int
    longest: list[Example]
    examples: list[Example]


def predict(plan: Plan, clients: int | None, probe: bool) -> dict[str, Any]:
    """Payload bytes per client and round, peak resident bytes of one process, seconds per step and in all."""
    federated = plan.recipe.rounds is not None
    rows = split_rows(plan, alone=not federated)
    base = load_base(plan.recipe.base, writable=True)
    members = next(iter(rows.clients.values()))
    examples = encode_rows(plan, base, members, "plan", lambda event: None)
    longest = sorted(examples, key=lambda e: -len(e.input_ids))[: plan.recipe.batch_size]
    work = Workload(clients or len(rows.clients), longest, examples)
    shapes = {name: tuple(param.shape) for name, param in base.parameters().items()}
    replica = Replica(base, plan)
    numel = {name: value.numel() for name, value in replica.trainable.wire.items()}
    result: dict[str, Any] = {
        "recipe_id": plan.id,
        "base": base.name,
        "clients": work.clients,
        "trainable": sum(numel.values()),
        "seconds_per_step": None,
        "seconds": None,
    }
    if federated:
        result |= payload_bytes(plan, numel, work.clients)
    if probe:
        seconds = _probe(plan, replica, work)
        steps = (plan.recipe.rounds or 0) * work.clients * plan.recipe.local_steps or plan.recipe.steps or 0
        result |= {"seconds_per_step": seconds, "seconds": seconds * steps}
        result["peak_rss_bytes"] = peak_rss() + _export_bytes(plan, numel)
    else:
        result["peak_rss_bytes"] = memory_bytes(plan, shapes, numel, work, base)
    return result


def payload_bytes(plan: Plan, numel: dict[str, int], clients: int) -> dict[str, float]:
    """Means per client and round over a whole run, as the summary counts them."""
    size, steps = plan.num_directions, plan.recipe.local_steps
    plans = [plan.for_group(i) for i in range(-1, len(plan.recipe.clients))]
    shares = [max(0.0, 1 - sum(g.share for g in plan.recipe.clients)), *(g.share for g in plan.recipe.clients)]
    bound = plan.uplink.method_name() == "projection"  # its budgets follow the norms of the change: an upper bound
    up = sum(
        share * p.uplink.predict_bytes(numel, 0 if bound else p.recipe.local_steps)
        for share, p in zip(shares, plans, strict=True)
    )
    taking_part = min(clients, getattr(plan.schedule, "clients_per_round", clients))
    pairs = 0.0 if bound or not size else size * (1 - (1 - 1 / size) ** (steps * taking_part))  # distinct directions
    record = MEMBERS_BYTES + plan.downlink.predict_bytes(numel, round(pairs))
    down = record * clients / taking_part  # in the end everybody holds every round
    if isinstance(plan.aggregation, SeedSum) and plan.aggregation.selection == "amplitude":
        down += 2 * size
    return {"payload_up_bytes_per_client_round": round(up, 1), "payload_down_bytes_per_client_round": round(down, 1)}


def memory_bytes(
    plan: Plan, shapes: dict[str, tuple[int, ...]], numel: dict[str, int], work: Workload, base: Base
) -> int:
    """Peak resident bytes of one process by formula: program, weights, copies, gradients, optimizer, activations."""
    weights = {name: math.prod(shape) for name, shape in shapes.items()}
    total, largest = sum(weights.values()), max(weights.values())
    trained = sum(numel.values())
    subspace = plan.parametrization.uses_basis
    overlay = plan.estimator.forward_only
    copies = 0 if overlay and plan.basis is not None and plan.basis.one_pass else total if subspace else trained
    gradient = largest if subspace or plan.parametrization.method_name() == "full" else trained
    moments = {"adamw": 2, "sgd": 0}.get(plan.optimizer.method_name(), 2) * trained
    config = base.model.config
    tokens = min(sum(len(e.input_ids) for e in work.longest), plan.recipe.micro_batch_tokens)
    kept = ACTIVATIONS_PER_HIDDEN * config.hidden_size * config.num_hidden_layers * tokens
    scratch = 2 * largest if overlay else kept + gradient
    numbers = total + copies + moments + scratch
    return int(psutil.Process().memory_info().rss - FLOAT * total + FLOAT * numbers + _export_bytes(plan, numel))


def _export_bytes(plan: Plan, numel: dict[str, int]) -> int:
    """What making a payload holds at once beyond training: the difference, and its encoding."""
    return (FLOAT + 2) * sum(numel.values()) if plan.uplink.method_name() in ("dense", "projection") else 0


def _probe(plan: Plan, replica: Replica, work: Workload) -> float:
    """Seconds of one typical step, after a step on the longest rows has met the peak; nothing is kept."""
    trainable = replica.trainable
    size = plan.recipe.batch_size
    typical = [work.examples[i] for i in stream(plan.recipe.seed, "probe").permutation(len(work.examples))[:size]]
    memory = Memory.empty()
    seconds = 0.0
    trainable.begin(0, plan.estimator.forward_only)
    for rows in (work.longest, typical, typical):
        batches = micro_batches(rows, plan.recipe, replica.model, replica.base.tokenizer.pad_token_id)
        objective = BatchObjective(replica.model, batches, Compute.of(plan.recipe))
        started = time.monotonic()
        train_step(trainable, plan.estimator, plan.optimizer, objective, memory, 1.0, stream(0, "probe"))
        seconds = time.monotonic() - started
    trainable.rollback()
    evaluate(replica.model, replica.base.tokenizer, work.longest[:8], max_new_tokens=4)
    return seconds
