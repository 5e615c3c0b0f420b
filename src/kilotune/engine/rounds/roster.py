"""Roster: the clients of a run as the server knows them: who is there, which rounds each holds, what each is sent."""

from collections.abc import Callable
from typing import Any

from kilotune.core.errors import FederationError
from kilotune.engine.composing.plan import Plan
from kilotune.engine.flower.messages import Exchange, Facts, Reply, Request
from kilotune.engine.memory import peak_rss
from kilotune.engine.privacy.private import Rounds
from kilotune.engine.rounds.intake import numbers
from kilotune.engine.rounds.ledger import Ledger
from kilotune.engine.rounds.tally import Tally

Emit = Callable[[dict[str, Any]], None]
FAREWELL_S = 60.0  # how long a client that is away at the very end is waited for


class Roster:
    """`known` holds the rounds of every client that has said hello; who fails is taken out and asked again."""

    def __init__(
        self,
        plan: Plan,
        base_digest: str,
        ledger: Ledger,
        exchange: Exchange,
        tally: Tally,
        privacy: Rounds,
        emit: Emit,
        shared: bool,
    ) -> None:
        """`shared`: all clients live on the server's replica; what it would take to bring them up to the last round
        is counted, not sent."""
        self.known: dict[str, int] = {}
        self._plan, self._base_digest, self._ledger, self._exchange = plan, base_digest, ledger, exchange
        self._tally, self._privacy, self._emit, self._shared = tally, privacy, emit, shared

    def greet(self, roster: list[str]) -> None:
        """Ask everyone reachable what they hold; refuse who follows another recipe or base."""
        self.ask(roster, self._plan.recipe.deadline_s)
        if not self.known:
            raise FederationError(
                f"no client of {len(roster)} could join: see the refusals above. Check recipe and base on both ends."
            )

    def ask(self, clients: list[str], deadline_s: float) -> None:
        """Say hello to these clients."""
        requests = {client: Request("hello", self.common()) for client in clients}
        for client, reply in self._exchange.exchange(requests, deadline_s):
            if reply.error is not None:
                self._emit({"event": "client", "client": client, "status": "refused", "why": reply.error})
                continue
            self.known[client] = self._agreed(client, reply)
            self._privacy.hear(client, reply.body)
            if not self._shared:
                self._emit({"event": "client", "client": client, "status": "joined", **numbers(reply.body)})

    def _agreed(self, client: str, reply: Reply) -> int:
        """Rounds of this ledger that a client holds; one that stands on another history is sent everything again."""
        held, head, records = reply.body.get("round"), reply.body.get("head"), self._ledger.records
        held = held if type(held) is int else -1
        heads = [self._ledger.header.hash, *(record.hash for record in records[max(0, held - 1) : held])]
        if 0 <= held <= len(self._ledger) and head in (None, heads[-1]):
            return held
        self._emit({"event": "client", "client": client, "status": "astray", "why": f"holds another round {held}"})
        return 0

    def common(self) -> Facts:
        """What every request says."""
        standing: Facts = {"rounds": len(self._ledger), "head": self._ledger.head}
        return {"recipe_id": self._plan.id, "base_digest": self._base_digest, **standing}

    def request(self, kind: str, client: str, body: Facts, more: tuple[bytes, ...] = ()) -> Request:
        """A request with the rounds that the client misses, and `more` after them."""
        known = self.known.get(client, 0)
        parts = [self._ledger.part(number) for number in range(known + 1, len(self._ledger) + 1)]
        return Request(kind, {**self.common(), "first": known + 1, **body}, (*parts, *more))

    def count_down(self, requests: dict[str, Request]) -> int:
        """Payload bytes of these requests, which are counted."""
        sent = sum(sum(map(len, request.payloads)) for request in requests.values())
        self._tally.down_bytes += sent
        return sent

    def note(self, client: str, reply: Reply) -> None:
        """What a good reply says of the client beside its answer."""
        self._privacy.hear(client, reply.body)
        held = reply.body.get("round")
        if type(held) is int:
            self.known[client] = held
        told = reply.body.get("peak_rss_bytes")
        self._tally.peak_rss_bytes = max(self._tally.peak_rss_bytes, told if type(told) is int else 0, peak_rss())

    def finish(self) -> None:
        """Hand everyone the last rounds, so that all end with the same weights."""
        if self._shared:
            self._tally.down_bytes += (down_bytes := self._owed())
            self._emit({"event": "finishing", "down_bytes": down_bytes})
            return
        requests = {client: self.request("finish", client, {}) for client in sorted(self.known)}
        self._emit({"event": "finishing", "down_bytes": self.count_down(requests)})
        for client, reply in self._exchange.exchange(requests, min(self._plan.recipe.deadline_s, FAREWELL_S)):
            if reply.error is None:
                self._tally.client_digests[client] = str(reply.body["digest"])
                self.note(client, reply)
            else:
                self._emit({"event": "client", "client": client, "status": "error", "why": reply.error})

    def _owed(self) -> int:
        """Bytes of all rounds that clients do not hold yet."""
        owed = [0]  # to a client that holds all rounds, all but one, ...
        for number in range(len(self._ledger), 0, -1):
            owed.append(owed[-1] + len(self._ledger.part(number)))
        return sum(owed[len(self._ledger) - known] for known in self.known.values())
