"""Clashes: parts of a recipe that are each right and do not fit together; a message names both and a working pair."""

from typing import TYPE_CHECKING

from kilotune.engine.composing.channel import channel_clashes
from kilotune.engine.composing.choosers import chooser_clashes
from kilotune.engine.composing.control import control_clashes
from kilotune.engine.composing.pairs import pair_clashes
from kilotune.engine.composing.portions import portion_clashes
from kilotune.engine.composing.recipe import CODECS, FEDERATED_ONLY, Recipe
from kilotune.engine.composing.relaying import relay_clashes
from kilotune.engine.composing.values import value_clashes
from kilotune.engine.partial.arms import arm_clashes
from kilotune.engine.partial.emulator import emulator_clashes
from kilotune.engine.partial.split import split_clashes, split_warning
from kilotune.engine.rounds.pace import pace_clashes
from kilotune.engine.rounds.personal import personal_clashes
from kilotune.engine.rounds.streaming import streaming_clashes
from kilotune.engine.secure.capabilities import secure_clashes
from kilotune.engine.training.shards import sharding_clashes

if TYPE_CHECKING:
    from kilotune.engine.composing.plan import Plan
    from kilotune.parametrization import Parametrization


def clashes(plan: "Plan") -> list[str]:
    """Pairs of parts that do not fit, each with a pair that does."""
    return [
        *_uplink_clashes(plan),
        *_server_clashes(plan),
        *_direction_clashes(plan),
        *pair_clashes(plan),
        *value_clashes(plan),
        *personal_clashes(plan),
        *chooser_clashes(plan),
        *relay_clashes(plan),
        *channel_clashes(plan),
        *portion_clashes(plan),
        *_rate_clashes(plan),
        *_privacy_clashes(plan),
        *secure_clashes(plan),
        *sharding_clashes(plan),
        *_straggler_clashes(plan),
        *control_clashes(plan),
        *pace_clashes(plan),
        *arm_clashes(plan),
        *streaming_clashes(plan),
        *emulator_clashes(plan),
        *split_clashes(plan),
    ]


def _uplink_clashes(plan: "Plan") -> list[str]:
    up, estimator, optimizer = plan.uplink.method_name(), plan.estimator.method_name(), plan.optimizer.method_name()
    problems = []
    if plan.uplink.takes == "seeds":
        if "seed_log" not in plan.estimator.gives:
            problems.append(
                f"uplink {up!r} needs 'seed_log', but estimator {estimator!r} does not give it. "
                "Use estimator: zeroth_order, or uplink: coefficients."
            )
        if plan.basis is None:
            problems.append(f"uplink {up!r} needs a basis. Use parametrization: subspace, or uplink: dense.")
        if not plan.optimizer.by_parts:
            problems.append(
                f"uplink {up!r} sends one scalar per direction, which optimizer {optimizer!r} with its memory cannot "
                "be replayed from. Use optimizer: {name: sgd, momentum: 0}, or uplink: coefficients."
            )
    if plan.uplink.bare.method_name() == "coefficients" and plan.basis is None:
        problems.append("uplink 'coefficients' needs a basis. Use parametrization: subspace, or uplink: dense.")
    if up == "projection" and plan.parametrization.method_name() != "full":
        problems.append("uplink 'projection' projects whole weights. Use parametrization: full, or uplink: dense.")
    return problems


def _server_clashes(plan: "Plan") -> list[str]:
    up, down, rule = plan.uplink.method_name(), plan.downlink.method_name(), plan.aggregation.method_name()
    pairs = "pairs" in plan.uplink.gives
    problems = []
    if plan.aggregation.takes != "any" and pairs != (plan.aggregation.takes == "seeds"):
        good = "seed_sum" if pairs else "mean"
        problems.append(f"aggregation {rule!r} cannot combine what uplink {up!r} sends. Use aggregation: {good}.")
    fitting = ("projection",) if up == "projection" else ("seed_scalar", "coefficients", "peers")
    if pairs and down not in fitting:
        problems.append(f"downlink {down!r} cannot send what uplink {up!r} brings. Use downlink: {fitting[0]}.")
    if not pairs and "pairs" in plan.downlink.gives:
        problems.append(f"downlink {down!r} needs pairs, but uplink {up!r} brings tensors. Use downlink: {up}.")
    outer = plan.server_optimizer
    if pairs and not outer.by_parts:
        problems.append(
            f"server_optimizer {outer.method_name()!r} with its memory needs tensors, but uplink {up!r} brings pairs. "
            "Use server_optimizer: {name: sgd, momentum: 0}, or uplink: coefficients."
        )
    return problems


def _direction_clashes(plan: "Plan") -> list[str]:
    rule, up, problems = plan.aggregation.method_name(), plan.uplink.method_name(), []
    shared = plan.recipe.shared_directions
    if rule == "trimmed_mean" and "own_support" in plan.uplink.traits:
        good = "coefficients" if up == "projection" else "quantized"
        problems.append(
            f"aggregation 'trimmed_mean' needs numbers that all clients send, but with uplink {up!r} each chooses its "
            f"own. Use aggregation: geometric_median, or uplink: {good}."
        )
    if rule == "trimmed_mean" and plan.uplink.takes == "seeds" and not shared:
        problems.append(
            "aggregation 'trimmed_mean' needs several votes on a direction, but every client draws its own. "
            "Use shared_directions: true, or aggregation: geometric_median."
        )
    if shared and plan.uplink.takes != "seeds":
        problems.append(
            f"shared_directions: has no effect with uplink {up!r}. Remove it, or use uplink: seed_scalar with "
            "estimator: zeroth_order."
        )
    if shared and plan.optimizer.lr == "auto":
        problems.append(
            "shared_directions: needs optimizer.lr as a number: to measure a rate each client draws directions of its "
            "own. Give a number."
        )
    if shared and getattr(plan.aggregation, "selection", "uniform") != "uniform":
        problems.append("shared_directions: prescribes directions that are drawn alike. Use selection: uniform.")
    return problems


def _rate_clashes(plan: "Plan") -> list[str]:
    problems = []
    if plan.optimizer.lr == "auto" and "curvature" not in plan.estimator.gives:
        problems.append(
            f"optimizer.lr: auto needs 'curvature', which estimator {plan.estimator.method_name()!r} does not measure. "
            "Give a number, or use estimator: zeroth_order."
        )
    if plan.server_optimizer.lr == "auto":
        problems.append("server_optimizer.lr: got 'auto', expected a number > 0; 1.0 takes the mean as it is.")
    return problems


def _privacy_clashes(plan: "Plan") -> list[str]:
    if plan.privacy is None:
        return []
    return _central_clashes(plan) if plan.privacy.unit == "client" else _local_clashes(plan)


def _central_clashes(plan: "Plan") -> list[str]:
    rule, schedule, problems = plan.aggregation.method_name(), plan.schedule.method_name(), []
    if not plan.aggregation.linear:
        problems.append(
            f"privacy 'central' bounds what one client adds to a sum, but with aggregation {rule!r} it can move what "
            "others count for. Use aggregation: mean, or seed_sum for pairs."
        )
    if plan.aggregation.weighting != "equal":
        problems.append(
            f"privacy 'central' counts every client alike, but aggregation.weighting is {plan.aggregation.weighting!r}."
            " Use --set aggregation.weighting=equal."
        )
    if plan.uplink.method_name() == "projection":
        problems.append(
            "privacy 'central' clips one vector per client, but uplink 'projection' sends other seeds for each. "
            "Use uplink: dense, or parametrization: subspace with uplink: coefficients."
        )
    if schedule not in ("all", "uniform"):
        problems.append(f"privacy 'central' cannot account for schedule {schedule!r}. Use schedule: all, or uniform.")
    if plan.recipe.staleness.max:
        problems.append(
            "privacy 'central' counts a client once in a round, but staleness.max lets a late answer join a new one. "
            "Use --set staleness.max=0."
        )
    per_round, planned = getattr(plan.schedule, "clients_per_round", 1), getattr(plan.privacy, "clients", 0)
    if per_round > planned:
        problems.append(f"schedule.clients_per_round: got {per_round}, expected at most privacy.clients = {planned}.")
    return problems


def _local_clashes(plan: "Plan") -> list[str]:
    estimator, problems = plan.estimator.method_name(), []
    if "example_slopes" not in plan.estimator.gives:
        problems.append(
            f"privacy 'local' needs 'example_slopes', but estimator {estimator!r} does not give them. "
            "Use estimator: zeroth_order, or privacy: central."
        )
    if plan.optimizer.lr == "auto":
        problems.append(
            "privacy 'local' hides single slopes, but optimizer.lr: auto measures the curvature on raw losses. "
            "Give a number, e.g. one that auto found on public rows."
        )
    return problems


def _straggler_clashes(plan: "Plan") -> list[str]:
    secure, problems = plan.recipe.secure_aggregation.enabled, []
    if secure and plan.schedule.method_name() == "over_select":
        problems.append(
            "schedule 'over_select' ends a round while some are still at work, but under secure_aggregation their "
            "masks are part of the sum. Use schedule: uniform; secure_aggregation.threshold says how many may drop out."
        )
    if not plan.recipe.staleness.max:
        return problems
    off, up, rule = "or --set staleness.max=0", plan.uplink.method_name(), plan.aggregation.method_name()
    if plan.basis is not None and plan.basis.refresh == "round":
        problems.append(
            "staleness adds answers of several rounds, but with basis.refresh: round each round has directions of its "
            f"own. Use --set basis.refresh=run, {off}."
        )
    if "round_bound" in plan.uplink.traits:
        problems.append(
            f"staleness adds answers of several rounds, but what uplink {up!r} sends belongs to its own round. "
            f"Use uplink: dense, {off}."
        )
    if not plan.aggregation.linear:
        problems.append(f"staleness weighs answers, but aggregation {rule!r} does not. Use aggregation: mean, {off}.")
    if secure:
        problems.append(
            "staleness needs answers that count alone, but under secure_aggregation only the sum of a round does. "
            "Use --set staleness.max=0, or secure_aggregation.enabled=false."
        )
    return problems


def warnings(plan: "Plan") -> list[str]:
    """What works and should be known before clients send anything."""
    found = split_warning(plan)
    hidden = plan.privacy is not None or plan.recipe.secure_aggregation.enabled
    if plan.uplink.takes == "seeds" and plan.recipe.batch_size == 1 and not hidden:
        found += [
            "batch_size: 1 with an uplink of scalars tells the server one example's loss difference along a known "
            "direction at every step. Use a larger batch, privacy: local, or secure_aggregation (docs/defences.md)."
        ]
    return found


def mode_problems(recipe: Recipe, mode: str, parametrization: "Parametrization | None") -> list[str]:
    """Keys that are missing or mean nothing where this recipe is to run: `federate` or `tune`."""
    if mode == "federate":
        problems = [] if recipe.rounds else ["rounds: missing. Say how many, e.g. --set rounds=10."]
        if recipe.steps:
            problems.append("steps: has no effect in a federation. Use rounds and local_steps.")
        if recipe.sharding.slices:
            problems.append(
                "sharding: has no effect in a federation, which has `kilotune withdraw`. Use it with `kilotune tune`."
            )
        if parametrization is not None and parametrization.looks_at:
            problems.append(
                f"parametrization.start: would look at {parametrization.looks_at} rows together, which clients do not "
                "show. Use start: weight, or `kilotune tune`."
            )
        return problems
    problems = [] if recipe.steps else ["steps: missing. Say how many optimizer steps, e.g. --set steps=100."]
    if recipe.rounds:
        problems.append("rounds: has no effect when one machine tunes alone. Use steps, or `kilotune federate`.")
    alone: tuple[str, ...] = FEDERATED_ONLY
    if parametrization is not None and not parametrization.uses_basis:
        alone = (*FEDERATED_ONLY, *CODECS)
    if recipe.streaming.overlap or recipe.streaming.mixing:
        problems.append("streaming: has no effect when one machine tunes alone. Remove it, or use `kilotune federate`.")
    if recipe.emulator.active:
        problems.append("emulator: has no effect when one machine tunes alone. Remove it, or use `kilotune federate`.")
    if recipe.staleness.max:
        problems.append("staleness: has no effect when one machine tunes alone. Remove it, or use `kilotune federate`.")
    if recipe.secure_aggregation.enabled:
        problems.append("secure_aggregation: has no effect when one machine tunes alone. Use `kilotune federate`.")
    problems += [
        f"{key}: has no effect when one machine tunes alone. Remove it, or use `kilotune federate`."
        for key in alone
        if getattr(recipe, key)
    ]
    return problems
