"""Control: what rules that reach over a round need of the rest of a recipe.

A rule for clients says with `gives` what it leaves for the server's rule, a rule for servers with `needs` what it
takes.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kilotune.engine.composing.plan import Plan

PAIRS = {
    "control_variates": ("scaffold", "controlled_averaging"),
    "momentum": ("shared_momentum", "one_bit_adam"),
}
"""What a rule for clients leaves to one for servers -> a pair that works."""
LEAST_FACTOR = 1000.0  # of defences.norm_factor, from which on no honest update is scaled down


def control_clashes(plan: "Plan") -> list[str]:
    """Rules at the wrong end, and controls that would not be the mean of what the clients hold."""
    local, server = plan.optimizer, plan.server_optimizer
    problems = []
    if local.needs:
        problems.append(
            f"optimizer {local.method_name()!r} is a rule for servers. Use it as server_optimizer, with optimizer: "
            "adamw, or scaffold for controlled_averaging."
        )
    if server.gives:
        problems.append(
            f"server_optimizer {server.method_name()!r} is a rule for clients. Use it as optimizer, with "
            "server_optimizer: sgd, or controlled_averaging for scaffold."
        )
    for word, (given, taken) in PAIRS.items():
        if word in local.gives and plan.recipe.steps:
            problems.append(f"optimizer {local.method_name()!r} needs other clients. Use optimizer: adamw.")
        elif word in local.gives and word not in server.needs:
            problems.append(
                f"optimizer {local.method_name()!r} leaves {word!r} to a server that does not use it. "
                f"Use server_optimizer: {taken}, or optimizer: adamw."
            )
        elif word in server.needs and word not in local.gives:
            problems.append(
                f"server_optimizer {server.method_name()!r} needs {word!r}, but optimizer {local.method_name()!r} does "
                f"not give it. Use optimizer: {given}, or server_optimizer: sgd."
            )
        elif word in local.gives and word == "control_variates":
            problems += _control_clashes(plan)
    return problems + (_lasting(plan) if server.public_copies else [])


def _lasting(plan: "Plan") -> list[str]:
    """What everybody follows from round to round has to mean the same in all of them, and be heard as it is."""
    name = f"server_optimizer {plan.server_optimizer.method_name()!r}"
    faults = {
        "keeps numbers along directions that have to stay. Use --set basis.refresh=run.": (
            plan.basis is not None and plan.basis.refresh == "round"
        ),
        "keeps numbers of tensors that have to stay. Use a parametrization without fresh_start, such as peft.": (
            "fresh_start" in plan.parametrization.gives
        ),
        "makes the step from what a round brings, which the gate would take for it. Use it without defences.gate.": (
            plan.recipe.defences.gate is not None
        ),
        "follows every tensor in every round. Use uplink and downlink without fragments.": plan.downlink.cycle > 1,
        "takes answers of the round they were asked in. Use --set staleness.max=0.": (
            plan.recipe.staleness.max > 0 and bool(plan.optimizer.gives)
        ),
    }
    problems = [f"{name} {why}" for why, applies in faults.items() if applies]
    warmup = getattr(plan.server_optimizer, "warmup", None)
    for way in ("uplink", "downlink") if warmup is not None else ():
        rounds = getattr(getattr(plan, way), "rounds", warmup)
        if rounds != warmup:
            problems.append(f"{way}.rounds: got {rounds}, but {name} has a warmup of {warmup} rounds. Use one number.")
    return problems


def _control_clashes(plan: "Plan") -> list[str]:
    recipe, name = plan.recipe, f"optimizer {plan.optimizer.method_name()!r}"
    defences, privacy = recipe.defences, plan.privacy
    faults = {
        "goes on from the controls of its last round. Use keep_optimizer: true.": not recipe.keep_optimizer,
        "counts changes of rounds at one learning rate. Use lr_schedule: constant and warmup_frac: 0.": (
            recipe.lr_schedule != "constant" or recipe.warmup_frac > 0 or plan.optimizer.lr == "auto"
        ),
        "needs to know how its numbers arrive. Use an uplink of tensors, such as dense.": (
            plan.uplink.takes != "tensors" or "pairs" in plan.uplink.gives
        ),
        "makes good itself what an uplink loses. Use the codec inside the residual.": plan.uplink.remembers,
        "counts on the sum of what all clients send. Use aggregation: mean.": not plan.aggregation.linear,
        "counts on what it sent, which these defences may scale down. Use --set defences.norm_factor=1000.": (
            defences.enabled and defences.norm_factor < LEAST_FACTOR
        ),
        "cannot know how masks or noise change what it sent. Use it without secure_aggregation and privacy.": (
            recipe.secure_aggregation.enabled or privacy is not None
        ),
        "moves on with every answer, which has to count. Use schedule: all, or uniform.": (
            plan.schedule.method_name() not in ("all", "uniform")
        ),
        "needs clients that take equal steps. Use it without clients, or optimizer: adamw.": bool(recipe.clients),
    }
    problems = [f"{name} {why}" for why, applies in faults.items() if applies]
    return problems + _participation(plan)


def _participation(plan: "Plan") -> list[str]:
    share = getattr(plan.server_optimizer, "participation", None)
    if share is None:
        return []
    if plan.schedule.everybody and share != 1:
        return [f"server_optimizer.participation: got {share}, but schedule 'all' asks everybody. Use 1."]
    if not plan.schedule.everybody and share == 1:
        return [
            "server_optimizer.participation: got 1, but the schedule asks only some. Give clients_per_round over all "
            "clients, or use schedule: all."
        ]
    if share < 1 and plan.aggregation.weighting != "equal":
        return [
            "server_optimizer.participation below 1 needs clients that count alike, but aggregation.weighting is "
            f"{plan.aggregation.weighting!r}. Use --set aggregation.weighting=equal."
        ]
    return []
