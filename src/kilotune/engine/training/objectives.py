"""Objectives: what each local step of a client's round makes smaller, where the client holds the whole model."""

from collections.abc import Iterator, Sequence

from kilotune.core.rng import derive
from kilotune.engine.composing.plan import Plan
from kilotune.engine.model.compute import Compute
from kilotune.engine.privacy.privatesteps import PrivateSteps
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rows.batches import BatchSampler, micro_batches
from kilotune.engine.rows.tokenize import Example
from kilotune.engine.training.step import BatchObjective
from kilotune.estimator import Objective


def objectives(
    plan: Plan, replica: Replica, name: str, train: Sequence[Example], number: int, private: PrivateSteps | None
) -> Iterator[Objective]:
    """One for each of the round's local steps: the loss on a batch of the client's rows."""
    recipe = plan.recipe
    sampler = BatchSampler(len(train), recipe.batch_size, derive(recipe.seed, "batches", name))
    for step in range(recipe.local_steps):
        at = (number - 1) * recipe.local_steps + step
        rows = [train[i] for i in (private.batch() if private else sampler.indices(at))]
        batches = micro_batches(rows, recipe, replica.model, replica.base.tokenizer.pad_token_id)
        yield BatchObjective(replica.model, batches, Compute.of(recipe), private.slope if private else None)
