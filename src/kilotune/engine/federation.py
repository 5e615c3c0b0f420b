"""Federation: the server's side of all rounds. It sees requests and replies only, so simulated, in-process and
deployed runs pass through this one loop.

One round: choose clients → send each what it missed of the ledger → collect payloads → combine → encode what
everybody (this server included) will decode and apply → append to the ledger. The append is the commit: a server
killed before it repeats the round with the same result, killed after it goes on with the next.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kilotune.aggregation.seed_sum import SeedSum, pack_probabilities, probabilities
from kilotune.core.errors import FederationError, WireError
from kilotune.core.rng import stream
from kilotune.core.types import SeedUpdate, State, TensorUpdate, Update
from kilotune.engine.compose import Plan
from kilotune.engine.evaluation import EvaluationReport
from kilotune.engine.files import read_tensors, write_tensors
from kilotune.engine.flower.messages import Exchange, Reply, Request
from kilotune.engine.ledger import Contribution, Ledger
from kilotune.engine.replica import Replica, coordinates
from kilotune.engine.worker import peak_rss

Emit = Callable[[dict[str, Any]], None]


@dataclass
class Tally:
    """Payload bytes and client-rounds so far."""

    up_bytes: int = 0
    down_bytes: int = 0
    client_rounds: int = 0
    peak_rss_bytes: int = 0
    client_digests: dict[str, str] = field(default_factory=dict)


NEWCOMER_S = 60.0  # how long a round waits for the first word of clients that are new or back
FAREWELL_S = 60.0  # how long a client that is away at the very end is waited for
COUNTED = ("up_bytes", "down_bytes", "client_rounds", "peak_rss_bytes")
"""What of the tally goes on when a run is resumed."""


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
    ) -> None:
        """`evaluate` measures the replica on rows the server holds; None: the clients measure on theirs."""
        self.plan, self.replica, self.ledger, self.exchange = plan, replica, ledger, exchange
        self.folder, self.emit, self._evaluate = folder, emit, evaluate
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
        for record, payload in self.ledger.since(self.replica.round):
            self.replica.apply(record.round, payload)
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
            self.emit({"event": "client", "client": client, "status": "joined", **_numbers(reply)})

    def finish(self) -> None:
        """Hand everyone the last rounds, so that all end with the same weights."""
        requests = {client: self._request("finish", client, {}) for client in sorted(self._known)}
        self.emit({"event": "finishing", "down_bytes": self._count_down(requests)})
        for client, reply in self.exchange.exchange(requests, min(self.plan.recipe.deadline_s, FAREWELL_S)):
            if reply.error is None:
                self.tally.client_digests[client] = str(reply.body["digest"])
                self._note(client, reply)
            else:
                self.emit({"event": "client", "client": client, "status": "error", "why": reply.error})

    # -- one round --------------------------------------------------------------------------------------------

    def round(self, number: int) -> None:
        """One round, committed to the ledger. Raises FederationError when too few clients answer."""
        started = time.monotonic()
        self._ask([c for c in self.exchange.roster() if c not in self._known], NEWCOMER_S)
        roster = sorted(self._known)
        chosen = self.plan.schedule.sample(number, roster, stream(self.plan.recipe.seed, "schedule", number))
        progress = (number - 1) / (self.plan.recipe.rounds or 1)
        requests = {
            c: self._request(
                "train", c, {"round": number, "progress": progress, "group": self.plan.group_of(c, roster)}
            )
            for c in chosen
        }
        down_bytes = self._count_down(requests)
        accepted = self._collect(number, requests)
        if len(accepted) < self.plan.recipe.min_clients:
            raise FederationError(
                f"round {number}: {len(accepted)} of {len(chosen)} clients answered, min_clients is "
                f"{self.plan.recipe.min_clients}. Run the same command again when they are back; nothing is lost."
            )
        self._commit(number, accepted)
        self.emit(
            {
                "event": "round",
                "round": number,
                "clients": len(accepted),
                "asked": len(chosen),
                "loss": float(np.mean([float(reply.body["loss"]) for _, reply, _ in accepted])),
                "up_bytes": sum(len(reply.payloads[0]) for _, reply, _ in accepted),
                "down_bytes": down_bytes,
                "seconds": time.monotonic() - started,
                "head": self.ledger.head,
            }
        )

    def _common(self) -> dict[str, str | int | float | bool]:
        return {"recipe_id": self.plan.id, "base_digest": self.replica.base.digest, "head": self.ledger.head}

    def _request(self, kind: str, client: str, body: dict[str, Any]) -> Request:
        known = self._known.get(client, 0)
        parts = [record.members + payload for record, payload in self.ledger.since(known)]
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

    def _collect(self, number: int, requests: dict[str, Request]) -> list[tuple[str, Reply, Update]]:
        accepted = []
        context = self.replica.context(number)
        silent = set(requests)
        for client, reply in self.exchange.exchange(requests, self.plan.recipe.deadline_s):
            silent.discard(client)
            event = {"event": "client", "round": number, "client": client}
            try:
                if reply.error is not None or len(reply.payloads) != 1:
                    raise WireError(reply.error or f"expected one payload, got {len(reply.payloads)}")
                if int(reply.body["num_examples"]) < 1:
                    raise WireError("reports no examples")
                update = self.plan.uplink.decode(reply.payloads[0], context)
            except (WireError, KeyError) as error:
                self._known.pop(client, None)  # ask it again what it holds
                self.emit({**event, "status": "error", "why": str(error)})
                continue
            self._note(client, reply)
            self.tally.up_bytes += len(reply.payloads[0])
            self.tally.client_rounds += 1
            accepted.append((client, reply, update))
            self.emit({**event, "status": "ok", "up_bytes": len(reply.payloads[0]), **_numbers(reply)})
        for client in sorted(silent):
            self._known.pop(client, None)
            self.emit({"event": "client", "round": number, "client": client, "status": "missing"})
        return sorted(accepted, key=lambda item: item[0])

    def _commit(self, number: int, accepted: list[tuple[str, Reply, Update]]) -> None:
        counts = [int(reply.body["num_examples"]) for _, reply, _ in accepted]
        weights = self.plan.aggregation.weights(counts)
        combined = self.plan.aggregation.combine([u for _, _, u in accepted], weights, self._states["aggregation"])
        combined = self._outer_step(combined)
        if isinstance(combined, SeedUpdate) and self.plan.downlink.takes == "tensors" and self.plan.basis is not None:
            combined = coordinates(self.plan, combined)
        payload = self.plan.downlink.encode(combined, self.replica.context(number), self._states["downlink"])
        self.replica.apply(number, payload)
        self._save_states(number)
        contributions = tuple(
            Contribution(client, count, float(weight), hashlib.sha256(reply.payloads[0]).hexdigest())
            for (client, reply, _), count, weight in zip(accepted, counts, weights, strict=True)
        )
        self.ledger.append(self.plan.root(number), payload, contributions)

    def _outer_step(self, mean: Update) -> Update:
        """The server's optimizer takes minus the mean change as a gradient; plain sgd with lr 1 takes the mean."""
        rule = self.plan.server_optimizer
        if isinstance(mean, SeedUpdate):
            return SeedUpdate(mean.indices, mean.coefs * np.float32(rule.lr), mean.groups)
        states, stepped = self._states["optimizer"], {}
        for name, change in mean.tensors.items():
            prefix = f"{name}/"
            state = {k.removeprefix(prefix): v for k, v in states.items() if k.startswith(prefix)}
            state = state or rule.init(change)
            stepped[name] = rule.update(-change, state, torch.zeros_like(change), float(rule.lr))
            states.update({prefix + k: v for k, v in state.items()})
        return TensorUpdate(stepped)

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
