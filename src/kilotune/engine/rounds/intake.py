"""Intake: one round's answers, from their arrival to their sum.

With defences an answer is checked, written to the book and, when all are there, judged, bounded and added: a payload
is decoded twice, and one at a time is in memory. Without defences it goes into the sum as it arrives.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from kilotune.aggregation import Gathering
from kilotune.core.errors import WireError
from kilotune.core.types import State, Update, WireContext
from kilotune.engine.composing.plan import Plan
from kilotune.engine.flower.messages import Facts, Reply
from kilotune.engine.partial.split import DOWN, UP, told_bytes
from kilotune.engine.rounds.book import Book
from kilotune.engine.rounds.bounds import said_by
from kilotune.engine.rounds.guard import Guard, Judgement, Mark
from kilotune.engine.rounds.late import Lateness
from kilotune.engine.rounds.ledger import Contribution
from kilotune.engine.rounds.tally import Answer

BESIDE = "pruning", "rank", UP, DOWN
NUMBERS = ("round", "num_examples", "num_held_out", "loss_first", "loss", "seconds", "peak_rss_bytes", *BESIDE)
"""What the book keeps of a reply beside its payload."""


def numbers(facts: Mapping[str, object]) -> dict[str, Any]:
    """What a reply says about itself in numbers, for an event."""
    told = {key: facts[key] for key in NUMBERS if isinstance(facts.get(key), int | float)}
    return {f"client_{key}" if key == "round" else key: value for key, value in told.items()}


class Intake:
    """Takes the answers of one round."""

    def __init__(
        self,
        plan: Plan,
        number: int,
        lateness: Lateness,
        guard: Guard,
        book: Book,
        context: WireContext,
        group_of: Callable[[str], int],
        gathering: Gathering,
    ) -> None:
        """`lateness` knows the rounds an answer may stand on, `group_of` the client's place in a mixed federation,
        `gathering` is where what counts goes."""
        self._plan, self._number, self._lateness = plan, number, lateness
        self._factor = lateness.factor(number)
        self._guard, self._book, self._context, self._group_of = guard, book, context, group_of
        self._gathering = gathering
        self._marks: dict[str, Mark] = {}
        self._judgement: Judgement | None = None
        self.answers: dict[str, Answer] = {}
        self.refused: dict[str, str] = {}  # by the guard: client -> why
        self.guard_seconds = 0.0

    # -- arrival ----------------------------------------------------------------------------------------------

    def take(self, client: str, reply: Reply) -> Answer:
        """One answer. Raises WireError with the reason when it cannot count."""
        if reply.error is not None or len(reply.payloads) != 1:
            raise WireError(reply.error or f"expected one payload, got {len(reply.payloads)}")
        answer = self._accept(client, reply.body, reply.payloads[0], str(reply.body.get("head", "")))
        self._book.add(client, {k: reply.body[k] for k in NUMBERS if k in reply.body}, reply.payloads[0])
        return answer

    def retake(self, found: dict[str, Facts]) -> Iterator[Answer]:
        """The answers that the book holds already."""
        for client, payload in self._book.payloads(found):
            with suppress(WireError):
                yield self._accept(client, found[client], payload, None)

    def _accept(self, client: str, facts: Facts, payload: bytes, head: str | None) -> Answer:
        count, loss = facts.get("num_examples"), facts.get("loss", math.nan if self._plan.privacy else None)
        held = facts.get("round")
        if type(count) is not int or type(held) is not int or not isinstance(loss, int | float):
            raise WireError("does not report its round, rows and loss as numbers")
        if count < 1:
            raise WireError("reports no examples")
        up, down = told_bytes(self._plan, facts)
        digest = hashlib.sha256(payload).hexdigest()
        answer = Answer(client, count, float(loss), len(payload) + up, digest, down_bytes=down)
        try:
            if client in self.answers:
                raise WireError("answers twice in one round")
            late = self._rounds_late(held, head)
            answer = replace(answer, discount=self._lateness.discount(late))
            update = self._plan.uplink.decode(payload, said_by(client, self._context))
            self._examine(answer, update, self._number - late)
        except WireError as error:
            self.refused[client] = str(error)
            raise
        self.answers[client] = answer
        return answer

    def _rounds_late(self, held: int, head: str | None) -> int:
        if not self._guard.enabled and not self._plan.recipe.staleness.max:
            return 0  # without defences an answer is believed to be what was asked for
        return self._lateness.rounds(self._number, held, head)

    def _examine(self, answer: Answer, update: Update, number: int) -> None:
        """`number` is the round the answer was made for."""
        if not self._guard.enabled:
            share = self._plan.aggregation.share(answer.num_examples) * answer.discount
            self._gathering.add_weighted(update, share)
            return
        started = time.perf_counter()
        group = self._group_of(answer.client)
        factor = self._lateness.factor(number)
        self._marks[answer.client] = self._guard.check(number, group, answer, update, factor)
        self.guard_seconds += time.perf_counter() - started

    # -- when all are there -----------------------------------------------------------------------------------

    def judge(self) -> list[Answer]:
        """The answers that count, by name."""
        if self._guard.enabled:
            started = time.perf_counter()
            self._judgement = self._guard.judge(self.answers, self._marks, self._factor, self._again)
            self.guard_seconds += time.perf_counter() - started
            self.refused |= self._judgement.refused
            self.answers = {c: a for c, a in self.answers.items() if c not in self._judgement.refused}
        return [self.answers[client] for client in sorted(self.answers)]

    def combine(self, state: State) -> tuple[Update, tuple[Contribution, ...]]:
        """What the round comes to, and what every client's part in it is."""
        order = list(self.answers)  # of arrival, as they went into the sum
        if self._judgement is not None:
            order = sorted(self.answers)
            for client, payload in self._book.payloads(order):
                started = time.perf_counter()
                verdict = self._judgement.verdicts[client]
                update = verdict.bounded(self._plan.uplink.decode(payload, said_by(client, self._context)))
                self.guard_seconds += time.perf_counter() - started
                self._gathering.add_weighted(update, verdict.share)
        combined = self._gathering.result(state)
        weights = dict(zip(order, self._gathering.weights().tolist(), strict=True))
        return combined, tuple(self._contribution(client, weights[client]) for client in sorted(order))

    def _contribution(self, client: str, weight: float) -> Contribution:
        answer = self.answers[client]
        part = Contribution(client, answer.num_examples, weight, answer.payload_sha256)
        if self._judgement is None:
            return part
        verdict = self._judgement.verdicts[client]
        return replace(part, scale=verdict.scale, limit=verdict.limit)

    def _again(self, client: str) -> Update:
        ((_, payload),) = self._book.payloads([client])
        return self._plan.uplink.decode(payload, said_by(client, self._context))

    def event(self) -> dict[str, object]:
        """What the guard did, for the run's record."""
        judged = self._judgement
        return {
            "event": "guard",
            "round": self._number,
            "accepted": len(self.answers),
            "refused": [{"client": client, "why": why} for client, why in sorted(self.refused.items())],
            "clipped_scalars": judged.clipped_scalars if judged else 0.0,
            "clipped_norms": judged.clipped_norms if judged else 0.0,
            "capped_weights": judged.capped_weights if judged else 0,
        }
