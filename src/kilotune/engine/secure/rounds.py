"""The server's side of a round over an Exchange: keys and shares before training, the opening of the sum after it.

Before it asks for the first share that opens a sum, the server writes down whose sum it is. A round that breaks off
after that is repeated with exactly these clients: two sums over different clients would tell the difference.
"""

import hashlib
import json
import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from kilotune.core.errors import FederationError, WireError
from kilotune.core.types import State, Update
from kilotune.engine.composing.plan import Plan
from kilotune.engine.files import write_json
from kilotune.engine.flower.messages import Exchange, Facts, Reply, Request
from kilotune.engine.rounds.ledger import Contribution, Ledger
from kilotune.engine.rounds.tally import Answer
from kilotune.engine.secure.capabilities import grid_of, length
from kilotune.engine.secure.fixed import Mean
from kilotune.engine.secure.server import ServerSession, Stage
from kilotune.engine.secure.vectors import Shapes, rebuild
from kilotune.engine.secure.wire import LEAST_CLIENTS, member_id, threshold_of

Emit = Callable[[dict[str, Any]], None]
OPENING = "opening.json"
STAGE_S = 60.0  # how long a stage without training waits for its clients


class SecureRound:
    """One attempt at one round: `prepare` and `with_mail` before the clients train; then it is the round's intake,
    whose `judge` opens the sum."""

    guard_seconds = 0.0

    def __init__(
        self, plan: Plan, number: int, ledger: Ledger, exchange: Exchange, folder: Path, emit: Emit, shapes: Shapes
    ) -> None:
        self._plan, self._number, self._exchange, self._emit, self._shapes = plan, number, exchange, emit, shapes
        self._numel = {name: math.prod(shape) for name, shape in shapes.items()}
        self._path = folder / "state" / OPENING
        self._head, self._genesis, self._attempt = ledger.head, ledger.header.hash, secrets.token_hex(16)
        self._bound = self._interrupted()
        self._mean: Mean | None = None
        self._answers: dict[str, Answer] = {}
        self.chosen: list[str] = []
        self.refused: dict[str, str] = {}
        self.lost: set[str] = set()  # who left one of the stages beside training
        self.up_bytes = self.down_bytes = 0  # of those stages
        self._mail_bytes = 0
        self.seconds = 0.0

    # -- before training --------------------------------------------------------------------------------------

    def prepare(self, chosen: list[str], roster: list[str], common: Facts) -> list[str]:
        """Collect keys and shares; returns the clients that may train. Raises FederationError below the threshold."""
        started, limit = time.monotonic(), self._plan.recipe.secure_aggregation.max_clients
        if self._bound is not None:
            chosen = self._bound
            self._require_all(set(roster))
        self.chosen = chosen
        if not LEAST_CLIENTS <= len(chosen) <= limit:
            raise FederationError(
                f"round {self._number}: {len(chosen)} clients are here, secure aggregation needs {LEAST_CLIENTS} to "
                f"{limit} (secure_aggregation.max_clients). Wait for others, or change the recipe on all ends."
            )
        self._facts: Facts = {**common, "round": self._number, "attempt": self._attempt}
        self._session = ServerSession(
            self._number,
            self._head,
            self._attempt,
            {client: member_id(self._genesis, client) for client in chosen},
            threshold_of(self._plan.recipe.secure_aggregation.threshold, len(chosen)),
            length(self._plan, self._numel),
            grid_of(self._plan),
        )
        self._ask("secure.keys", chosen, {}, (), self._session.take_keys)
        table = self._session.table()
        facts: Facts = {"threshold": self._session.threshold}
        self._ask("secure.shares", self._session.names(Stage.KEYS), facts, (table,), self._session.take_shares)
        senders = self._session.senders()
        self.seconds += time.monotonic() - started
        return senders

    def with_mail(self, requests: dict[str, Request]) -> dict[str, Request]:
        """The requests to train, each with what the others sealed for this client."""
        sealed = {}
        for client, request in requests.items():
            mail = self._session.mail(client)
            self._mail_bytes += len(mail)
            body = {**request.body, "attempt": self._attempt}
            sealed[client] = Request(request.kind, body, (*request.payloads, mail))
        return sealed

    # -- the round's intake -----------------------------------------------------------------------------------

    def take(self, client: str, reply: Reply) -> Answer:
        """One masked update, into the sum; its rows and loss are not told. Raises WireError when it cannot count."""
        payload = self._payload(reply)
        self._session.take_vector(client, payload)
        answer = Answer(client, 0, math.nan, len(payload), hashlib.sha256(payload).hexdigest())
        self._answers[client] = answer
        return answer

    def retake(self, found: dict[str, Facts]) -> Iterator[Answer]:
        """Masked updates of an earlier attempt are worth nothing, so none are kept."""
        yield from ()

    def judge(self) -> list[Answer]:
        """Open the sum; every answer gets the mean loss, the only one known. Raises FederationError below the
        threshold, or when the sum is none of that many clipped updates."""
        started = time.monotonic()
        survivors = self._session.survivors()
        names = self._session.names(Stage.VECTORS)
        if len(names) < self._plan.recipe.min_clients:  # nothing is opened for a round that will not count
            return list(self._answers.values())
        self._require_all(set(names))
        write_json(self._path, {"round": self._number, "head": self._head, "clients": names})
        self._ask("secure.unmask", names, {}, (survivors,), self._session.take_revealed)
        words = self._session.total()
        for client in self._session.liars():
            self._leave(client, "error", "its shares do not fit the others'")
        mean = grid_of(self._plan).mean(words, len(names))
        if mean is None:
            raise FederationError(
                f"round {self._number}: the sum is not one of {len(names)} clipped updates: a client sent words that "
                "are none, and the masks hide which. Run the same command again; if it happens again, ask the clients."
            )
        self._mean = mean
        self.seconds += time.monotonic() - started
        return [replace(self._answers[name], loss=mean.loss) for name in names]

    def combine(self, state: State) -> tuple[Update, tuple[Contribution, ...]]:
        """The mean update, and who took part; a weight the server cannot know is told as 0."""
        assert self._mean is not None, "the sum is opened first"
        weight = 1 / len(self._answers) if self._plan.aggregation.weighting == "equal" else 0.0
        parts = tuple(
            Contribution(name, 0, weight, self._answers[name].payload_sha256) for name in sorted(self._answers)
        )
        return rebuild(self._plan, self._mean.numbers, self._shapes), parts

    def event(self) -> dict[str, object]:
        """Nothing was judged one by one."""
        return {"event": "guard", "round": self._number, "accepted": len(self._answers), "refused": []}

    def figures(self) -> dict[str, Any]:
        """For the round's event. Added bytes: what is sent beyond the payloads of the same recipe without masks."""
        assert self._mean is not None, "the sum is opened first"
        plain = len(self._answers) * self._plan.uplink.predict_bytes(self._numel, self._plan.recipe.local_steps)
        masked = sum(answer.up_bytes for answer in self._answers.values())
        counts = {stage.name.lower(): len(self._session.names(stage)) for stage in Stage}
        return {
            "threshold": self._session.threshold,
            **counts,
            "examples": self._mean.weight,
            "clipped_frac": self._mean.clipped_frac,
            "added_up_bytes": self.up_bytes + masked - plain,
            "added_down_bytes": self.down_bytes + self._mail_bytes,
            "seconds": self.seconds,
        }

    # -- one stage --------------------------------------------------------------------------------------------

    def _ask(
        self,
        kind: str,
        clients: Iterable[str],
        facts: Facts,
        payloads: tuple[bytes, ...],
        take: Callable[[str, bytes], None],
    ) -> None:
        """Who does not answer, or not well, has dropped out of this round."""
        requests = {client: Request(kind, {**self._facts, **facts}, payloads) for client in clients}
        self.down_bytes += len(requests) * sum(map(len, payloads))
        silent = set(requests)
        deadline_s = min(self._plan.recipe.deadline_s, STAGE_S)
        for client, reply in self._exchange.exchange(requests, deadline_s):
            silent.discard(client)
            try:
                payload = self._payload(reply)
                take(client, payload)
            except WireError as error:
                self._leave(client, "error", str(error))
                continue
            self.up_bytes += len(payload)
        for client in sorted(silent):
            self._leave(client, "missing", f"no answer to {kind}")

    def _payload(self, reply: Reply) -> bytes:
        """Raises WireError for a failed reply, and for one of another attempt, which would spoil the sum."""
        if reply.error is not None or len(reply.payloads) != 1:
            raise WireError(reply.error or f"expected one payload, got {len(reply.payloads)}")
        if reply.body.get("attempt") != self._attempt:
            raise WireError("answers another attempt at a round")
        return reply.payloads[0]

    def _leave(self, client: str, status: str, why: str) -> None:
        self.lost.add(client)
        self._emit({"event": "client", "round": self._number, "client": client, "status": status, "why": why})

    def _interrupted(self) -> list[str] | None:
        """Whose sum an earlier attempt at this round began to open."""
        if not self._path.exists():
            return None
        found = json.loads(self._path.read_text(encoding="utf-8"))
        return list(found["clients"]) if (found["round"], found["head"]) == (self._number, self._head) else None

    def _require_all(self, here: set[str]) -> None:
        if self._bound is not None and set(self._bound) - here:
            raise FederationError(
                f"round {self._number}: an earlier attempt broke off while its sum was being opened, so it can only be "
                f"repeated with the same clients. Missing: {', '.join(sorted(set(self._bound) - here))}. Run the same "
                "command again when they are back."
            )
