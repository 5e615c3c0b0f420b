"""Workload: what a recipe will run on, from a sample of its rows, and how many steps the whole run will take.

Needs neither torch nor transformers: tokens come from the tokenizer's own file.
"""

from dataclasses import dataclass
from math import ceil

from kilotune.core.rng import stream
from kilotune.engine.composing.choosers import CHOOSER
from kilotune.engine.composing.plan import Plan
from kilotune.engine.planning.facts import Facts
from kilotune.engine.rows.filetokenizer import light_tokenizer
from kilotune.engine.rows.packing import cut
from kilotune.engine.rows.shares import ALONE, split_rows
from kilotune.engine.rows.tokenize import Example, encode
from kilotune.engine.training.shards import stage_steps

__all__ = ["Sample", "Workload", "batch_tokens", "planned_steps", "sample_rows", "workload"]

SAMPLE = 192  # rows that are tokenised
STEPS = 12  # batches drawn from the sample


@dataclass(frozen=True)
class Workload:
    """What a recipe will run on, from a sample of its rows."""

    clients: int
    steps: list[list[int]]  # of some steps: tokens of each micro-batch, padding included
    labels: float  # tokens with a loss per step
    longest: int  # tokens of the longest row
    prompt: float  # tokens before an answer, and of
    held_out: int  # rows to evaluate
    row: float = 0.0  # tokens of a row to train on, mean

    @property
    def peak_tokens(self) -> int:
        return max(max(step) for step in self.steps)


@dataclass(frozen=True)
class Sample:
    """Tokenised rows of the first few clients, and how many clients and held-out rows there are."""

    members: list[list[Example]]
    clients: int
    held_out: int


def sample_rows(plan: Plan) -> Sample:
    """As many rows of each of the first clients as make a sample."""
    rows = split_rows(plan, alone=plan.recipe.rounds is None)
    tokenizer = light_tokenizer(plan.recipe.base)
    chosen = [own for _, own in sorted(rows.clients.items()) if own][:STEPS]
    cut = [own[: max(1, SAMPLE // len(chosen))] for own in chosen]
    return Sample([encode(own, tokenizer, plan.recipe.data)[0] for own in cut], len(rows.clients), len(rows.held_out))


def workload(plan: Plan, facts: Facts, sample: Sample, clients: int | None) -> Workload:
    """Steps as they will be cut, drawn from the sample."""
    steps, labels, packs = [], 0, facts.packs and CHOOSER not in plan.parametrization.gives
    for number, members in enumerate(sample.members):
        for turn in range(ceil(STEPS / len(sample.members))):
            order = stream(plan.recipe.seed, "plan", number, turn).permutation(len(members))[: plan.recipe.batch_size]
            batch = [members[i] for i in order]
            steps.append(batch_tokens(batch, plan.recipe.micro_batch_tokens, packs))
            labels += sum(example.num_labels for example in batch)
    examples = [example for members in sample.members for example in members]
    return Workload(
        clients or sample.clients,
        steps,
        labels / len(steps),
        max(len(example.input_ids) for example in examples),
        sum(len(example.prompt_ids) for example in examples) / len(examples),
        sample.held_out,
        sum(len(example.input_ids) for example in examples) / len(examples),
    )


def batch_tokens(rows: list[Example], limit: int, packs: bool) -> list[int]:
    """Tokens of each micro-batch of one step, padding included, as `packing.cut` cuts them."""
    return [group[0].length * len(group) for group in cut(rows, limit, packs)]


def planned_steps(plan: Plan, clients: int) -> int:
    """Optimizer steps of the whole run, over the clients that take part in a round."""
    recipe = plan.recipe
    if recipe.sharding.slices:
        return stage_steps(plan, split_rows(plan, alone=True).clients[ALONE])
    return (recipe.rounds or 0) * clients * recipe.local_steps or recipe.steps or 0
