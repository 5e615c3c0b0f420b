"""Budgets: which matrices a group of clients trains, of which rank, on which batches and in which number format, so
that memory and time of its machines suffice; the result is the recipe's `clients` section.

1. Probe adapters P diag(e) Q are trained on a few batches. What a number w of them is worth is the mean over these
   batches of |w · dL/dw|, later ones counting more; a singular triplet is worth e_k plus the means over p_k and q_k.
2. For every batch size and precision that fits, triplets are taken in order of worth per byte while memory lasts.
3. Of these plans the one of the largest share of all worth times √(batch size) is kept: noise of a gradient falls with
   the root of the batch.

Source: "Automated Federated Pipeline for Parameter-Efficient Fine-Tuning of Large Language Models" (FedPipe); the
worth is the sensitivity of AdaLoRA (Zhang et al., arXiv 2303.10512, eq. 8 and 9).
Departs: the paper solves an integer program in two stages; here greedy choice within, and all of a small grid outside.
The base stays float32 in memory: `bf16` is the format of matrix products, and saves time where the machine has it. No
4-bit NormalFloat, which this project has no arithmetic for. How long adapters take is measured with all of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import fsum, sqrt
from typing import TYPE_CHECKING, Any

from kilotune.core.errors import RecipeError
from kilotune.core.factors import A, B, factor_pairs
from kilotune.core.rng import stream
from kilotune.core.types import State
from kilotune.core.units import human_bytes, human_seconds
from kilotune.engine.composing.pairs import rank
from kilotune.engine.planning import planner, workload
from kilotune.optimizer import Optimizer

if TYPE_CHECKING:
    from torch import Tensor

    from kilotune.core.trainable import Trainable
    from kilotune.engine.composing.plan import Plan
    from kilotune.estimator import Estimator, Objective

SMOOTHING = 0.85  # AdaLoRA, beta_1
PRECISIONS = ("fp32", "bf16")
FLOAT = 4
TRAINED = 3  # float32 numbers per trained one beside the moments: itself, its gradient, P beside the pair
WHOLE = 2  # and per number of the recipe's whole adapter, which a client holds with the start of the round
Worths = dict[str, list[float]]
"""Matrix -> what its triplets are worth, falling."""


# -- 1: what a triplet is worth ---------------------------------------------------------------------------------------


def triplet_worths(
    trainable: "Trainable", estimator: "Estimator", optimizer: "Optimizer", objectives: Iterable["Objective"]
) -> Worths:
    """Trains the adapters of `lora_svd` from their start, one batch after the other. The first batch moves e alone, so
    it takes two to tell."""
    from kilotune.engine.training.step import Memory, train_step  # with torch

    memory, rule = Memory.empty(), _Sensing(rule=optimizer, lr=optimizer.lr)
    for number, objective in enumerate(objectives):
        train_step(trainable, estimator, rule, objective, memory, 1.0, stream(0, "probe", number))
    sensitivity = {name: state["worth"] for name, state in memory.optimizer.items()}
    return {name: sorted(worths, reverse=True) for name, worths in _by_matrix(sensitivity).items()}


class _Sensing(Optimizer):
    """Another rule, which also remembers of every number what it is worth."""

    rule: Optimizer

    def init(self, param: "Tensor") -> State:
        return self.rule.init(param) | {"worth": param.new_zeros(param.shape)}

    def update(self, gradient: "Tensor", state: State, param: "Tensor", lr: float) -> "Tensor":
        felt = (param * gradient).abs()
        state["worth"].mul_(SMOOTHING).add_(felt * (1 - SMOOTHING))
        return self.rule.update(gradient, state, param, lr)


def _by_matrix(sensitivity: State) -> dict[str, list[float]]:
    found = {}
    for name, of_q in sensitivity.items():
        place, is_q, _ = name.partition(A)
        if is_q:
            of_e, of_p = sensitivity[f"{place}.lora_E"], sensitivity[f"{place}.lora_P"]
            found[matrix_of(name)] = (of_e + of_p.mean(0) + of_q.mean(1)).tolist()
    return dict(sorted(found.items()))


def matrix_of(factor: str) -> str:
    """The layer of the base that a factor belongs to."""
    return factor.replace(B, A).partition(A)[0].split(".", 2)[-1]


# -- 2: what a plan costs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Allowance:
    """What a machine has: bytes of memory, and seconds for the local steps of a round."""

    memory: float
    seconds: float


@dataclass(frozen=True)
class Portion:
    """What a group of clients does."""

    ranks: dict[str, int]
    batch_size: int
    precision: str
    share: float = 0.0  # of all worth

    def group(self, share: float) -> dict[str, Any]:
        """An entry of the recipe's `clients` for this fraction of them."""
        return {"share": share, "ranks": self.ranks, "batch_size": self.batch_size, "precision": self.precision}


@dataclass(frozen=True)
class Costs:
    """`fixed`: bytes of a process with base and activations, and seconds of a round, by (batch size, precision).
    `sides`: d_in + d_out of every matrix; `rank`: of the recipe. `moments`: numbers the optimizer holds per trained
    one."""

    fixed: Mapping[tuple[int, str], tuple[float, float]]
    sides: Mapping[str, int]
    rank: int
    moments: int

    def trained(self, ranks: Mapping[str, int]) -> int:
        """Numbers of all pairs, Σ r (d_in + d_out)."""
        return sum(rank * self.sides[name] for name, rank in ranks.items())

    @property
    def per_number(self) -> int:
        """Bytes of memory for one trained number."""
        return FLOAT * (TRAINED + self.moments)

    def adapters(self, ranks: Mapping[str, int]) -> int:
        """Bytes of adapters: the recipe's, and what is trained of them."""
        return FLOAT * WHOLE * self.rank * sum(self.sides.values()) + self.per_number * self.trained(ranks)

    def memory(self, portion: Portion) -> float:
        """Peak bytes of the process."""
        return self.fixed[portion.batch_size, portion.precision][0] + self.adapters(portion.ranks)

    def seconds(self, portion: Portion) -> float:
        """Of a round's local steps."""
        return self.fixed[portion.batch_size, portion.precision][1]


def costs_of(plan: "Plan", batches: Sequence[int], precisions: Sequence[str], emit: planner.Emit) -> Costs:
    """From the planner's figures of this machine: what a recipe costs with all its adapters, less their memory."""
    require_precisions(precisions)
    folder, facts = planner.open_facts(plan, emit)
    sample = workload.sample_rows(plan)
    fixed: dict[tuple[int, str], tuple[float, float]] = {}
    sides: dict[str, int] = {}
    for precision in precisions:
        for batch in batches:
            changed = plan.recipe.model_copy(update={"batch_size": batch, "precision": precision})
            varied = replace(plan, recipe=changed)
            figures = planner.figures_of(varied, folder, None, emit)
            assert figures is not None, "measured where it was not known"
            load = workload.workload(varied, facts, sample, None)
            alone = planner.memory_bytes(varied, facts, {}, load, figures)
            seconds = changed.local_steps * planner.step_seconds(varied, facts, load, figures)
            fixed[batch, precision] = (float(alone), seconds)
            sides = sides or sides_of(planner.wire_numbers(varied, facts, figures), rank(plan))
    return Costs(fixed, sides, rank(plan), plan.optimizer.copies)


def sides_of(numel: dict[str, int], components: int) -> dict[str, int]:
    """d_in + d_out of every matrix, from the numbers of its factors."""
    return {matrix_of(a): (numel[b] + numel[a]) // components for b, a in factor_pairs(numel)}


def require_precisions(precisions: Iterable[str]) -> None:
    """Raises RecipeError for a format that there is no arithmetic for."""
    for precision in precisions:
        if precision not in PRECISIONS:
            raise RecipeError(
                f"precision: got {precision!r}, expected one of {', '.join(PRECISIONS)}. Weights of a trained base are "
                "float32 in memory; use bf16 for its products."
            )


# -- 3: the best plan within an allowance -----------------------------------------------------------------------------


def portion(costs: Costs, worths: Worths, allowance: Allowance) -> Portion:
    """The best portion that fits. Raises RecipeError when none does."""
    require_precisions(precision for _, precision in costs.fixed)
    largest = max(batch for batch, _ in costs.fixed)
    found = []
    for batch, precision in sorted(costs.fixed, key=lambda at: (-at[0], PRECISIONS.index(at[1]))):
        empty = Portion({}, batch, precision)
        if costs.seconds(empty) <= allowance.seconds:
            filled = _filled(costs, worths, empty, allowance.memory)
            found.append((filled.share * sqrt(batch / largest), filled))
    best = max(found, key=lambda entry: entry[0])[1] if found else None
    if best is None or not best.ranks:
        least = min(map(costs.memory, (Portion({name: 1}, *at) for at in costs.fixed for name in costs.sides)))
        fastest = min(seconds for _, seconds in costs.fixed.values())
        raise RecipeError(
            f"clients: got {human_bytes(allowance.memory)} and {human_seconds(allowance.seconds)} for a round, "
            f"expected at least {human_bytes(least)} and {human_seconds(fastest)}. Use smaller batches, or fewer "
            "local steps."
        )
    return best


def _filled(costs: Costs, worths: Worths, empty: Portion, memory: float) -> Portion:
    """Triplets in order of worth per byte, as many as there is room for."""
    room = memory - costs.memory(empty)
    order = sorted(
        ((worth / costs.sides[name], name, worth) for name, each in worths.items() for worth in each if worth > 0),
        key=lambda item: (-item[0], item[1]),
    )
    ranks: dict[str, int] = {}
    taken: list[float] = []
    for _, name, worth in order:
        price = costs.per_number * costs.sides[name]
        if price <= room:
            ranks[name] = ranks.get(name, 0) + 1
            room -= price
            taken.append(worth)
    whole = fsum(worth for each in worths.values() for worth in each)
    return replace(empty, ranks=dict(sorted(ranks.items())), share=fsum(taken) / whole if whole else 0.0)


def groups(costs: Costs, worths: Worths, machines: Sequence[tuple[float, Allowance]]) -> list[dict[str, Any]]:
    """The recipe's `clients` for (fraction of the clients, what each of them has)."""
    return [portion(costs, worths, allowance).group(share) for share, allowance in machines]
