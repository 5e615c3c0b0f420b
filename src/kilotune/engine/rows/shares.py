"""Shares: a data source split for one run into every client's training rows and the rows for evaluation.

Numbers only: nothing here needs torch.
"""

from dataclasses import dataclass
from typing import Any

from kilotune.core.errors import DataError
from kilotune.core.rng import stream
from kilotune.engine.composing.plan import Plan
from kilotune.engine.rows.data import Row, data_digest, load_rows, partition, partition_counts

ALONE = "local"
"""The one client of a recipe that is tuned on one machine."""


@dataclass(frozen=True)
class Rows:
    """A data source split for one run: training rows by client, and evaluation rows."""

    clients: dict[str, list[Row]]
    held_out: list[Row]
    counts: dict[str, dict[str, Any]]  # per client: rows, and labels where the partition goes by a label
    digest: str  # of all rows before any was left out


def split_rows(plan: Plan, alone: bool) -> Rows:
    """Load, honour `split`, partition. Raises DataError when nothing is left to train or evaluate on."""
    section = plan.recipe.data
    rows = load_rows(section.path)
    train = [row for row in rows if row.split == "train"]
    held_out = [row for row in rows if row.split != "train"]
    if section.eval_path is not None:
        held_out = load_held_out(section.eval_path)
    if section.only is not None:
        train = [row for row in train if row.client == section.only]
    if not train:
        whose = f" of client {section.only!r}" if section.only is not None else ""
        raise DataError(
            f"{section.path}: got {len(rows)} rows, but no training row{whose}. Check `split` and `client`."
        )
    shares = {ALONE: list(range(len(train)))} if alone else partition(train, plan.partition, plan.recipe.seed)
    clients = {name: [train[i] for i in indices[: section.limit]] for name, indices in shares.items()}
    fields = plan.partition.fields if plan.partition is not None else ()
    label = next((field for field in fields if field != "client"), None)
    held_out = spread(held_out, plan.recipe.evaluation.limit, plan.recipe.seed)
    return Rows(clients, held_out, partition_counts(train, shares, label), data_digest(rows))


def load_held_out(path: str) -> list[Row]:
    """The rows of a file for evaluation: those that are not for training, or all where all are."""
    rows = load_rows(path)
    return [row for row in rows if row.split != "train"] or rows


def spread(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    """At most `limit` rows, taken in turn from every client's, each client's in a fixed random order."""
    if limit is None or len(rows) <= limit:
        return rows
    by_client: dict[str, list[Row]] = {}
    for row in rows:
        by_client.setdefault(row.client or "", []).append(row)
    queues = []
    for name in sorted(by_client):
        order = stream(seed, "held-out", name).permutation(len(by_client[name]))
        queues.append([by_client[name][i] for i in order])
    chosen: list[Row] = []
    depth = 0
    while len(chosen) < limit:
        chosen += [queue[depth] for queue in queues if depth < len(queue)][: limit - len(chosen)]
        depth += 1
    return chosen
