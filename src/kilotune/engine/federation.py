"""Federation: the server's side of all rounds. It sees requests and replies only, so simulated, in-process and
deployed runs pass through this one loop.

One round: choose clients → send each what it missed of the ledger → collect payloads → combine → encode what
everybody (this server included) will decode and apply → append to the ledger. The append is the commit: a server
killed before it repeats the round with the same result, killed after it goes on with the next.
"""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kilotune.aggregation import Gathering
from kilotune.aggregation.seed_sum import SeedSum, pack_probabilities, probabilities
from kilotune.core.errors import FederationError, WireError
from kilotune.core.rng import stream
from kilotune.core.types import SeedUpdate, State, Update, WireContext
from kilotune.engine.compose import Plan
from kilotune.engine.evaluation import EvaluationReport
from kilotune.engine.files import read_tensors, write_tensors
from kilotune.engine.flower.messages import Exchange, Reply, Request
from kilotune.engine.ledger import Contribution, Ledger
from kilotune.engine.replica import Replica, coordinates
from kilotune.engine.tally import COUNTED, Answer, Tally, outer_step
from kilotune.engine.worker import peak_rss

Emit = Callable[[dict[str, Any]], None]
NEWCOMER_S = 60.0  # how long a round waits for the first word of clients that are new or back
FAREWELL_S = 60.0  # how long a client that is away at the very end is waited for


class Federation:
    """Runs the rounds of one ledger over one exchange."""

    def __init__(
        self,
        plan: Plan,
        replica: Replica,
        ledger: Ledger,
        exchange: Exchange,
        folder: Path,
        emit: Emit,
        evaluate: Callable[[Replica], EvaluationReport] | None = None,
        shared: bool = False,
    ) -> None:
        """`evaluate` measures the replica on rows the server holds; None: the clients measure on theirs.
        `shared`: all clients live on this very replica (a simulation), so none has to join or to be brought up to
        the last round; what that would send is counted."""
        self.plan, self.replica, self.ledger, self.exchange = plan, replica, ledger, exchange
        self.folder, self.emit, self._evaluate, self._shared = folder, emit, evaluate, shared
        self.tally = Tally()
        self._known: dict[str, int] = {}  # rounds each client holds
        self._states: dict[str, State] = {"aggregation": {}, "optimizer": {}, "downlink": {}}

    # -- life of a run ----------------------------------------------------------------------------------------

    def run(self) -> dict[str, EvaluationReport]:
        """All rounds that are missing; returns the evaluations before and after."""
        self._resume()
        self.greet()
        first = self.evaluate(0) if not self.ledger.records else None
        best, without_gain = float("inf"), 0
        last = first
        rounds = self.plan.recipe.rounds or 0
        every = self.plan.recipe.evaluation.every
        for number in range(len(self.ledger) + 1, rounds + 1):
            self.round(number)
            last = None
            if every and number % every == 0 and number != rounds:
                last = self.evaluate(number)
                without_gain = 0 if last.overall.loss < best else without_gain + 1
                best = min(best, last.overall.loss)
                if self.plan.recipe.patience and without_gain >= self.plan.recipe.patience:
                    self.emit({"event": "stopped", "round": number, "why": "no better loss"})
                    break
        after = last if last is not None else self.evaluate(len(self.ledger))
        self.finish()
        return {"after": after} | ({"before": first} if first is not None else {})

    def _resume(self) -> None:
        self.replica.replay((record.round, payload) for record, payload in self.ledger.since(self.replica.round))
        if self.ledger.records:
            tensors, facts = read_tensors(self._state_path(len(self.ledger)))
            for key in COUNTED:
                setattr(self.tally, key, int(facts[key]))
            for path, value in tensors.items():
                owner, _, key = path.partition("/")
                self._states[owner][key] = value

    def greet(self) -> None:
        """Ask everyone reachable what they hold; refuse who follows another recipe or base."""
        roster = self.exchange.roster()
        self._ask(roster, self.plan.recipe.deadline_s)
        if not self._known:
            raise FederationError(
                f"no client of {len(roster)} could join: see the refusals above. Check recipe and base on both ends."
            )

    def _ask(self, clients: list[str], deadline_s: float) -> None:
        requests = {client: Request("hello", self._common()) for client in clients}
        for client, reply in self.exchange.exchange(requests, deadline_s):
            if reply.error is not None:
                self.emit({"event": "client", "client": client, "status": "refused", "why": reply.error})
                continue
            self._known[client] = int(reply.body["round"])
            if not self._shared:
                self.emit({"event": "client", "client": client, "status": "joined", **_numbers(reply)})

    def finish(self) -> None:
        """Hand everyone the last rounds, so that all end with the same weights."""
        if self._shared:
            self.tally.down_bytes += (down_bytes := self._owed())
            self.emit({"event": "finishing", "down_bytes": down_bytes})
            return
        requests = {client: self._request("finish", client, {}) for client in sorted(self._known)}
        self.emit({"event": "finishing", "down_bytes": self._count_down(requests)})
        for client, reply in self.exchange.exchange(requests, min(self.plan.recipe.deadline_s, FAREWELL_S)):
            if reply.error is None:
                self.tally.client_digests[client] = str(reply.body["digest"])
                self._note(client, reply)
            else:
                self.emit({"event": "client", "client": client, "status": "error", "why": reply.error})

    def _owed(self) -> int:
        """Bytes of all rounds that clients do not hold yet."""
        owed = [0]  # to a client that holds all rounds, all but one, ...
        for number in range(len(self.ledger), 0, -1):
            owed.append(owed[-1] + len(self.ledger.part(number)))
        return sum(owed[len(self.ledger) - known] for known in self._known.values())

    # -- one round --------------------------------------------------------------------------------------------

    def round(self, number: int) -> None:
        """One round, committed to the ledger. Raises FederationError when too few clients answer."""
        started = time.monotonic()
        self._ask([c for c in self.exchange.roster() if c not in self._known], NEWCOMER_S)
        roster = sorted(self._known)
        chosen = self.plan.schedule.sample(number, roster, stream(self.plan.recipe.seed, "schedule", number))
        progress = (number - 1) / (self.plan.recipe.rounds or 1)
        grouped = bool(self.plan.recipe.clients)
        requests = {
            c: self._request(
                "train",
                c,
                {"round": number, "progress": progress, "group": self.plan.group_of(c, roster) if grouped else -1},
            )
            for c in chosen
        }
        down_bytes = self._count_down(requests)
        gathering = self.plan.aggregation.gather()
        accepted = self._collect(number, requests, gathering)
        if len(accepted) < self.plan.recipe.min_clients:
            raise FederationError(
                f"round {number}: {len(accepted)} of {len(chosen)} clients answered, min_clients is "
                f"{self.plan.recipe.min_clients}. Run the same command again when they are back; nothing is lost."
            )
        self._commit(number, accepted, gathering)
        self.emit(
            {
                "event": "round",
                "round": number,
                "clients": len(accepted),
                "asked": len(chosen),
                "loss": float(np.mean([answer.loss for answer in accepted])),
                "up_bytes": sum(answer.up_bytes for answer in accepted),
                "down_bytes": down_bytes,
                "seconds": time.monotonic() - started,
                "head": self.ledger.head,
            }
        )

    def _common(self) -> dict[str, str | int | float | bool]:
        return {"recipe_id": self.plan.id, "base_digest": self.replica.base.digest, "head": self.ledger.head}

    def _request(self, kind: str, client: str, body: dict[str, Any]) -> Request:
        known = self._known.get(client, 0)
        parts = [self.ledger.part(number) for number in range(known + 1, len(self.ledger) + 1)]
        extra: dict[str, Any] = {"first": known + 1}
        if (
            kind == "train"
            and isinstance(self.plan.aggregation, SeedSum)
            and self.plan.aggregation.selection == "amplitude"
        ):
            chances = probabilities(self._states["aggregation"], self.plan.num_directions)
            parts.append(pack_probabilities(chances))
            extra["probabilities"] = True
        return Request(kind, {**self._common(), **extra, **body}, tuple(parts))

    def _count_down(self, requests: dict[str, Request]) -> int:
        sent = sum(sum(map(len, request.payloads)) for request in requests.values())
        self.tally.down_bytes += sent
        return sent

    def _note(self, client: str, reply: Reply) -> None:
        self._known[client] = int(reply.body["round"])
        self.tally.peak_rss_bytes = max(self.tally.peak_rss_bytes, int(reply.body.get("peak_rss_bytes", 0)), peak_rss())

    def _collect(self, number: int, requests: dict[str, Request], gathering: Gathering) -> list[Answer]:
        """Each reply goes into the sum as it arrives; what stays is a line about it, in order of the clients."""
        accepted = []
        context = self.replica.context(number)
        silent = set(requests)
        for client, reply in self.exchange.exchange(requests, self.plan.recipe.deadline_s):
            silent.discard(client)
            event = {"event": "client", "round": number, "client": client}
            try:
                answer, update = self._open(client, reply, context)
            except (WireError, KeyError) as error:
                self._known.pop(client, None)  # ask it again what it holds
                self.emit({**event, "status": "error", "why": str(error)})
                continue
            gathering.add(update, answer.num_examples)
            self._note(client, reply)
            self.tally.up_bytes += answer.up_bytes
            self.tally.client_rounds += 1
            accepted.append(answer)
            self.emit({**event, "status": "ok", "up_bytes": answer.up_bytes, **_numbers(reply)})
        for client in sorted(silent):
            self._known.pop(client, None)
            self.emit({"event": "client", "round": number, "client": client, "status": "missing"})
        return sorted(accepted, key=lambda answer: answer.client)

    def _open(self, client: str, reply: Reply, context: WireContext) -> tuple[Answer, Update]:
        """Raises WireError or KeyError for a reply that cannot count."""
        if reply.error is not None or len(reply.payloads) != 1:
            raise WireError(reply.error or f"expected one payload, got {len(reply.payloads)}")
        (payload,) = reply.payloads
        count, loss = int(reply.body["num_examples"]), float(reply.body["loss"])
        if count < 1:
            raise WireError("reports no examples")
        update = self.plan.uplink.decode(payload, context)
        return Answer(client, count, loss, len(payload), hashlib.sha256(payload).hexdigest()), update

    def _commit(self, number: int, accepted: list[Answer], gathering: Gathering) -> None:
        weights = self.plan.aggregation.weights([answer.num_examples for answer in accepted])
        combined = outer_step(
            self.plan.server_optimizer, gathering.result(self._states["aggregation"]), self._states["optimizer"]
        )
        if isinstance(combined, SeedUpdate) and self.plan.downlink.takes == "tensors" and self.plan.basis is not None:
            combined = coordinates(self.plan, combined)
        payload = self.plan.downlink.encode(combined, self.replica.context(number), self._states["downlink"])
        self.replica.apply(number, payload)
        self._save_states(number)
        contributions = tuple(
            Contribution(answer.client, answer.num_examples, float(weight), answer.payload_sha256)
            for answer, weight in zip(accepted, weights, strict=True)
        )
        self.ledger.append(self.plan.root(number), payload, contributions)

    def _state_path(self, number: int) -> Path:
        return self.folder / "state" / f"server-{number:05d}.safetensors"

    def _save_states(self, number: int) -> None:
        tensors = {f"{owner}/{key}": v for owner, state in self._states.items() for key, v in state.items()}
        counts = {key: str(getattr(self.tally, key)) for key in COUNTED}
        write_tensors(self._state_path(number), tensors, {"round": str(number), **counts})
        self._state_path(number - 2).unlink(missing_ok=True)

    # -- evaluation -------------------------------------------------------------------------------------------

    def evaluate(self, number: int) -> EvaluationReport:
        """Quality of the current state, on the server's rows or summed over the clients' own held-out rows."""
        down_bytes = 0
        if self._evaluate is not None:
            report = self._evaluate(self.replica)
        else:
            requests = {c: self._request("evaluate", c, {}) for c in self.exchange.roster() if c in self._known}
            down_bytes = self._count_down(requests)
            sums = {}
            for client, reply in self.exchange.exchange(requests, self.plan.recipe.deadline_s):
                if reply.error is None:
                    sums[client] = reply.body
                    self._note(client, reply)
                else:
                    self.emit({"event": "client", "client": client, "status": "error", "why": reply.error})
            report = EvaluationReport.from_sums(sums)
        self.emit({"event": "evaluation", "round": number, "down_bytes": down_bytes, **report.to_json()})
        return report


def _numbers(reply: Reply) -> dict[str, Any]:
    keys = ("round", "num_examples", "num_held_out", "loss_first", "loss", "seconds", "peak_rss_bytes")
    return {f"client_{k}" if k == "round" else k: reply.body[k] for k in keys if k in reply.body}
