"""The `clients` section of a recipe for machines of given memory and time: `budgets` on a base and rows at hand.

    python benchmarks/client_budgets.py fedpipe --machine 0.5:900MB:60 --machine 0.5:2GB:30 --set data.path=rows.jsonl

A machine is a fraction of the clients, their memory, and the seconds that the local steps of a round may take there, in
seconds of this machine. What is printed goes into the recipe; what each group is predicted to need stands behind it.
"""

import argparse
import sys

import torch
import yaml

from kilotune.core.units import human_bytes, human_seconds
from kilotune.engine.composing.compose import compose
from kilotune.engine.model.base import load_base
from kilotune.engine.planning.budget import parse_size
from kilotune.engine.planning.budgets import Allowance, costs_of, portion, triplet_worths
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rows.shares import ALONE, split_rows
from kilotune.engine.session import encode_rows
from kilotune.engine.training.objectives import objectives


def quiet(event: dict[str, object]) -> None:
    """Nobody watches."""


def machine(text: str) -> tuple[float, Allowance]:
    """fraction:memory:seconds."""
    share, memory, seconds = text.split(":")
    return float(share), Allowance(float(parse_size(memory, "--machine")), float(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="fedpipe")
    parser.add_argument("--set", action="append", default=[], help="as of `kilotune federate`")
    parser.add_argument("--machine", type=machine, action="append", required=True, help="FRACTION:MEMORY:SECONDS")
    parser.add_argument("--probes", type=int, default=6, help="batches on which the matrices are tried")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16], help="batch sizes to choose from")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], help="formats of products to choose from")
    arguments = parser.parse_args()
    plan = compose(arguments.recipe, "federate", [*arguments.set, f"local_steps={arguments.probes}", "clients=[]"])
    costed = compose(arguments.recipe, "federate", [*arguments.set, "clients=[]"])
    if plan.recipe.threads:
        torch.set_num_threads(plan.recipe.threads)
    costs = costs_of(costed, arguments.batches, arguments.precisions, quiet)
    base = load_base(plan.recipe.base, writable=True)
    replica = Replica(base, plan)
    rows = split_rows(plan, alone=True).clients[ALONE]
    examples = encode_rows(plan, base, rows, ALONE, quiet)
    replica.trainable.begin(plan.root(1))
    probes = objectives(plan, replica, ALONE, examples, 1, None)
    worths = triplet_worths(replica.trainable, plan.estimator, plan.optimizer, probes)
    found = [(share, portion(costs, worths, allowance)) for share, allowance in arguments.machine]
    content = {"clients": [one.group(share) for share, one in found]}
    sys.stdout.write(yaml.safe_dump(content, sort_keys=False))
    for share, one in found:
        needs = f"{human_bytes(costs.memory(one))}, {human_seconds(costs.seconds(one))} a round"
        sys.stdout.write(f"# {share:g} of the clients: {needs}, {one.share:.0%} of what all triplets are worth\n")


if __name__ == "__main__":
    main()
