"""Guard: what a server believes of a round's payloads. In this order (docs/defences.md):

1. schema, on arrival: whole, finite, asked for, of this round and history, as many pairs as steps, known directions;
2. physical bound, on arrival: no coefficient that no loss can give;
3. copies: a payload that was sent before, by whomever, is refused;
4. robust bounds: coefficients cut to a multiple of the median of the last rounds, then whole updates scaled down to a
   multiple of the median norm of the round;
5. weights: no client counts for more than a multiple of 1/n, whatever number of rows it claims.

It keeps some numbers of every payload, never the payload. All decisions follow from the round's payloads and what the
server's state remembers of the last rounds, so a resumed server decides the same.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from kilotune.core.errors import WireError
from kilotune.core.types import SeedUpdate, State, TensorUpdate, Update
from kilotune.engine.composing.compose import for_group
from kilotune.engine.composing.plan import Plan
from kilotune.engine.rounds.bounds import coefficient_limit, finite, prescribed, vocabulary_of
from kilotune.engine.rounds.ledger import Record
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rounds.tally import Answer

WINDOW = 10  # rounds whose scalars say how large a scalar is
ROUNDED = 1.001  # a coefficient sent as fp16 may be this much larger than what it was made from
SLICE = 1 << 18
MEDIANS = "medians"


@dataclass(frozen=True, slots=True)
class Mark:
    """What is kept of a payload until the others are there."""

    group: int
    norm: float
    middle: float | None = None  # median |coefficient|, of pairs of forward passes
    peak: float = 0.0  # largest |coefficient|
    num_scalars: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an update enters the sum: coefficients cut to `limit`, all of it times `scale`, with a share of `share`."""

    share: float
    limit: float | None = None
    scale: float = 1.0

    def bounded(self, update: Update) -> Update:
        """The update as it counts."""
        return bounded(update, self.limit, self.scale)


@dataclass(frozen=True)
class Judgement:
    """What became of a round's answers."""

    verdicts: dict[str, Verdict]  # of those that count
    refused: dict[str, str]  # client -> why
    clipped_scalars: float  # fraction of all scalars
    clipped_norms: float  # fraction of the updates that count
    capped_weights: int


def bounded(update: Update, limit: float | None, scale: float) -> Update:
    """An update with its coefficients cut and everything scaled, in float32: the same bits wherever it is redone."""
    factor = np.float32(scale)
    if isinstance(update, TensorUpdate):
        return update if scale == 1.0 else TensorUpdate({n: t * float(factor) for n, t in update.tensors.items()})
    coefs = update.coefs if limit is None else np.clip(update.coefs, np.float32(-limit), np.float32(limit))
    return SeedUpdate(update.indices, coefs if scale == 1.0 else coefs * factor, update.groups)


def norm_of(update: Update) -> float:
    """‖b‖₂ of the update as it was sent: along each direction what all its pairs amount to, or over all tensors."""
    if isinstance(update, SeedUpdate):
        keys = update.indices if update.groups is None else np.stack([update.groups, update.indices], axis=1)
        _, inverse = np.unique(keys, axis=0, return_inverse=True)
        order = np.lexsort((update.coefs, inverse.reshape(-1)))  # no order of the pairs shows
        sums = np.bincount(inverse.reshape(-1)[order], weights=update.coefs[order].astype(np.float64))
        return math.sqrt(float(np.square(sums).sum()))
    total = 0.0
    for name in sorted(update.tensors):
        flat = update.tensors[name].detach().cpu().float().numpy().reshape(-1)
        for start in range(0, flat.size, SLICE):
            total += float(np.square(flat[start : start + SLICE], dtype=np.float64).sum())
    return math.sqrt(total)


def lower_median(values: Iterable[float]) -> float:
    """The middle value; of an even number the smaller of the two, so that of two clients the larger is held to the
    smaller."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]


def capped(shares: list[float], factor: float) -> list[float]:
    """Shares with none above factor / n of their sum. Those below stay as they are, so a fair round stays the same."""
    limit, cut = factor / len(shares), set[int]()
    if limit >= 1 or min(shares) == max(shares):
        return shares
    if factor <= 1:
        return [1.0] * len(shares)
    while True:
        rest = math.fsum(share for i, share in enumerate(shares) if i not in cut)
        most = limit * rest / (1 - limit * len(cut))  # so that each of the cut ones has `limit` of everything
        above = {i for i, share in enumerate(shares) if i not in cut and share > most * (1 + 1e-12)}
        if not above:
            return [most if i in cut else share for i, share in enumerate(shares)]
        cut |= above  # they stay above: to cut one lowers `most` for the others


class Guard:
    """Judges the answers of one run's rounds. `state` is part of the server's state."""

    def __init__(self, plan: Plan, replica: Replica, state: State) -> None:
        self._plan, self._replica, self._state = plan, replica, state
        self._section = plan.recipe.defences
        self._plans = {group: for_group(plan, group) for group in range(-1, len(plan.recipe.clients))}
        self._seen: set[str] = set()  # payloads of committed rounds
        self._lists: dict[tuple[int, int], np.ndarray] = {}  # the directions prescribed last

    @property
    def enabled(self) -> bool:
        """Whether the recipe asks for it."""
        return self._section.enabled

    def remember(self, records: Iterable[Record]) -> None:
        """Payloads of committed rounds count once."""
        self._seen.update(c.payload_sha256 for record in records for c in record.contributions)

    # -- on arrival -------------------------------------------------------------------------------------------

    def check(self, number: int, group: int, answer: Answer, update: Update, factor: float) -> Mark:
        """Schema and physical bound of one payload. Raises WireError with the reason to refuse all of it."""
        if self._plan.privacy is None and not math.isfinite(answer.loss):
            raise WireError(f"reports a loss of {answer.loss}, expected a finite number")
        if not finite(update):
            raise WireError("sends numbers that are not finite")
        if isinstance(update, TensorUpdate):
            if {n: tuple(t.shape) for n, t in update.tensors.items()} != self._replica.shapes:
                raise WireError("sends other tensors than this recipe trains")
            return Mark(group, norm_of(update))
        if update.groups is not None:  # Ferret's pairs: their number and size are the codec's to know
            return Mark(group, norm_of(update))
        self._check_pairs(number, group, update, factor)
        sizes = np.abs(update.coefs.astype(np.float64))
        middle = lower_median((sizes / factor).tolist()) if sizes.size else None
        return Mark(group, norm_of(update), middle, float(sizes.max(initial=0.0)), sizes.size)

    def _check_pairs(self, number: int, group: int, update: SeedUpdate, factor: float) -> None:
        plan, size = self._plans[group], self._plan.num_directions
        if update.coefs.size > plan.recipe.local_steps:
            raise WireError(f"sends {update.coefs.size} pairs, expected at most {plan.recipe.local_steps}, one a step")
        if update.indices.size and not 0 <= update.indices.min() <= update.indices.max() < size:
            raise WireError(f"names a direction outside 0 .. {size - 1}")
        shared, named = plan.recipe.shared_directions, np.bincount(update.indices, minlength=size)
        if shared and (named > self._prescribed(number, group)).any():
            raise WireError("names directions that were not prescribed for this round")
        limit = coefficient_limit(plan, vocabulary_of(self._replica.base.model), factor)
        peak = float(np.abs(update.coefs).max(initial=0.0))
        if limit is not None and peak > ROUNDED * limit:
            raise WireError(f"sends a coefficient of {peak:.3g}, but no loss can give more than {limit:.3g}")

    def _prescribed(self, number: int, group: int) -> np.ndarray:
        """(directions,) how often each is probed in this round."""
        if (number, group) not in self._lists:
            wanted = prescribed(self._plans[group], self._replica.trainable, number)
            self._lists = {(number, group): np.bincount(wanted, minlength=self._plan.num_directions)}
        return self._lists[number, group]

    # -- when all are there -----------------------------------------------------------------------------------

    def judge(
        self,
        answers: dict[str, Answer],
        marks: dict[str, Mark],
        factor: float,
        again: Callable[[str], Update],
    ) -> Judgement:
        """Copies, robust bounds and weights. `again` decodes a client's payload once more."""
        if self._plan.privacy is not None and self._plan.privacy.unit == "client":
            # Bounds that follow from the others' updates would let one client move what all others count for.
            return Judgement({client: Verdict(1.0) for client in answers}, {}, 0.0, 0.0, 0)
        refused = self._copies(answers, marks)
        clients = [client for client in sorted(answers) if client not in refused]
        if not clients:
            return Judgement({}, refused, 0.0, 0.0, 0)
        limit = self._limit([marks[client] for client in clients], factor)
        norms, cut = self._cut_norms(clients, marks, limit, again)
        scales = self._scales(norms, {client: marks[client].group for client in clients})
        rule = self._plan.aggregation
        shares = [rule.share(answers[client].num_examples) * answers[client].discount for client in clients]
        fair = capped(shares, self._section.weight_cap)
        verdicts = {
            client: Verdict(share, limit if limit is not None and marks[client].peak > limit else None, scales[client])
            for client, share in zip(clients, fair, strict=True)
        }
        return Judgement(
            verdicts,
            refused,
            cut / max(1, sum(marks[client].num_scalars for client in clients)),
            sum(scale != 1.0 for scale in scales.values()) / len(clients),
            sum(a != b for a, b in zip(shares, fair, strict=True)),
        )

    def _copies(self, answers: dict[str, Answer], marks: dict[str, Mark]) -> dict[str, str]:
        refused, owners = {}, dict[str, str]()
        for client in sorted(answers):
            digest = answers[client].payload_sha256
            if marks[client].norm == 0:
                continue  # nothing, sent twice, is nothing
            if digest in self._seen:
                refused[client] = "sends a payload that was part of an earlier round"
            elif digest in owners:
                refused[client] = f"sends the same payload as {owners[digest]}"
            owners.setdefault(digest, client)
        return refused

    def _limit(self, marks: list[Mark], factor: float) -> float | None:
        """The median over the last rounds of the clients' median |coefficient|, times `scalar_factor`."""
        middles = [mark.middle for mark in marks if mark.middle is not None]
        if not middles:
            return None
        past = self._state[MEDIANS].tolist() if MEDIANS in self._state else []
        recent = [*past, lower_median(middles)][-WINDOW:]
        self._state[MEDIANS] = torch.tensor(recent, dtype=torch.float64)
        return float(np.float32(self._section.scalar_factor * lower_median(recent) * factor))

    def _cut_norms(
        self, clients: list[str], marks: dict[str, Mark], limit: float | None, again: Callable[[str], Update]
    ) -> tuple[dict[str, float], int]:
        """Norms after the coefficients are cut, and how many are."""
        norms, cut = {client: marks[client].norm for client in clients}, 0
        for client in clients:
            if limit is not None and marks[client].peak > limit:
                update = again(client)
                norms[client] = norm_of(bounded(update, limit, 1.0))
                cut += int((np.abs(update.coefs) > limit).sum()) if isinstance(update, SeedUpdate) else 0
        return norms, cut

    def _scales(self, norms: dict[str, float], groups: dict[str, int]) -> dict[str, float]:
        """What every update is multiplied with. Clients are compared with their own group, whose steps are like
        theirs; one alone in its group with everybody."""
        everybody = lower_median(norms.values())
        scales = {}
        for client, norm in norms.items():
            peers = [norms[other] for other in norms if groups[other] == groups[client]]
            most = self._section.norm_factor * (lower_median(peers) if len(peers) > 1 else everybody)
            scales[client] = 1.0 if norm <= most else float(np.float32(most / norm))
        return scales
