"""Federation: the server's side of all rounds. It sees requests and replies only, so simulated, in-process and
deployed runs pass through this one loop.

One round: choose clients → send each what it missed of the ledger → collect payloads into the round's book → judge,
bound and combine them (intake, guard) → encode what everybody (this server included) will decode and apply → append to
the ledger. The append is the commit: a server killed before it goes on with the round and comes to the same result,
killed after it goes on with the next.
"""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from kilotune.aggregation.seed_sum import SeedSum, pack_probabilities, probabilities
from kilotune.core.errors import FederationError, WireError
from kilotune.core.rng import stream
from kilotune.engine.afterwards.withdrawn import withdrawn
from kilotune.engine.composing.clashes import warnings
from kilotune.engine.composing.plan import Plan
from kilotune.engine.flower.messages import Exchange, Facts, Request
from kilotune.engine.model.evaluation import EvaluationReport
from kilotune.engine.partial.arms import Orders
from kilotune.engine.privacy.private import private_rounds
from kilotune.engine.rounds.book import Book
from kilotune.engine.rounds.gate import Gate
from kilotune.engine.rounds.guard import Guard
from kilotune.engine.rounds.intake import Intake, numbers
from kilotune.engine.rounds.late import AtWork, Lateness
from kilotune.engine.rounds.ledger import Ledger
from kilotune.engine.rounds.outcome import ServerState, outcome
from kilotune.engine.rounds.pace import Pace
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rounds.roster import Roster
from kilotune.engine.rounds.tally import Answer, Tally
from kilotune.engine.secure.rounds import SecureRound

GroupOf = Callable[[str], int]
Emit = Callable[[dict[str, Any]], None]
NEWCOMER_S = 60.0  # how long a round waits for the first word of clients that are new or back


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
        self._state = ServerState(folder / "state")
        self._guard = Guard(plan, replica, self._state.guard)
        self.privacy = private_rounds(plan, ledger, folder, clients_measure=evaluate is None)
        self._roster = Roster(plan, replica.base.digest, ledger, exchange, self.tally, self.privacy, emit, shared)
        self._pace = Pace(plan.recipe.adapt_steps and not shared)
        self._orders = Orders(plan, replica, self._state.arms, simulated=shared)
        self._at_work = AtWork(exchange, 0 if shared else plan.recipe.staleness.max)
        self._book = Book(
            folder / "contributions", self.privacy.keeps(plan.recipe.keep_contributions), self._guard.enabled
        )
        score = None if evaluate is None else lambda: evaluate(replica).overall.loss
        self._gate = Gate(plan.recipe.defences, replica, self._state.guard, score)

    # -- life of a run ----------------------------------------------------------------------------------------

    def run(self) -> dict[str, EvaluationReport]:
        """All rounds that are missing; returns the evaluations before and after."""
        self._resume()
        self._roster.greet(self._present())
        for text in warnings(self.plan) if len(self._roster.known) > 1 else ():
            self.emit({"event": "warning", "text": text})
        first = self.evaluate(0) if not self.ledger.records else None
        best, without_gain = float("inf"), 0
        last = first
        rounds = self.plan.recipe.rounds or 0
        every = self.plan.recipe.evaluation.every
        for number in range(len(self.ledger) + 1, rounds + 1):
            if why := self.privacy.exhausted(sorted(self._roster.known)):
                self.emit({"event": "stopped", "round": number - 1, "why": why})
                break
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
        self._at_work.drop(list(self._at_work.on))
        self._roster.finish()
        return {"after": after} | ({"before": first} if first is not None else {})

    def _resume(self) -> None:
        self.replica.replay((record.round, payload) for record, payload in self.ledger.since(self.replica.round))
        if self.ledger.records:
            self._state.load(len(self.ledger), self.tally)
            self._guard.remember(self.ledger.records)
            self._book.settle(len(self.ledger), len(self.exchange.roster()))

    def _present(self) -> list[str]:
        """Clients that are there; those that were withdrawn are asked nothing more and forgotten."""
        gone = withdrawn(self.folder)
        self._at_work.drop([client for client in gone if client in self._at_work.on])
        for client in gone:
            self._roster.known.pop(client, None)
        return [client for client in self.exchange.roster() if client not in gone]

    # -- one round --------------------------------------------------------------------------------------------

    def round(self, number: int) -> None:
        """One round, committed to the ledger. Raises FederationError when too few clients answer."""
        started = time.monotonic()
        self._at_work.begin(number)
        newcomers = [c for c in self._present() if c not in self._roster.known]
        self._roster.ask(newcomers, min(NEWCOMER_S, self.plan.recipe.deadline_s))
        found = self._book.open(number, self.ledger.head)
        roster = sorted({*self._roster.known, *found} - withdrawn(self.folder))
        chosen = self.privacy.choose(number, [c for c in roster if c not in self._at_work.on])
        secure = self._secure(number)
        asked = [c for c in chosen if c not in found]
        if secure:
            asked = secure.prepare(chosen, roster, self._roster.common())
            chosen = secure.chosen
        progress = (number - 1) / (self.plan.recipe.rounds or 1)
        group_of = partial(self.plan.group_of, roster=roster)
        self._orders.give(chosen, group_of)
        requests = self._asked(number, asked, progress, group_of)
        if secure:
            requests = secure.with_mail(requests)
        down_bytes = self._roster.count_down(requests)
        intake = secure or self._intake(number, group_of)
        enough = self.plan.schedule.enough(len(chosen))
        if self._shared:
            requests = self._first(number, chosen, enough, requests)
        late = self.plan.recipe.staleness.max > 0  # then who was at work answers unasked
        for answer in intake.retake({c: facts for c, facts in found.items() if late or c in chosen}):
            self._accepted(number, answer, found[answer.client])
            enough -= 1
        self._collect(number, requests, intake, enough)
        for slow in self._pace.slow() if self.privacy.tells_clients else ():
            self.emit({"event": "slow", "round": number, **asdict(slow)})
        accepted = self._judged(number, intake)
        if secure:
            self._count_stages(secure)
        if len(accepted) < self.plan.recipe.min_clients:
            raise FederationError(
                f"round {number}: {len(accepted)} of {len(chosen)} clients answered, min_clients is "
                f"{self.plan.recipe.min_clients}. Run the same command again when they are back; nothing is lost."
            )
        down_bytes += sum(answer.down_bytes for answer in accepted)
        self._commit(number, intake)
        self._book.settle(number, len(roster))
        self.emit(
            {
                "event": "round",
                "round": number,
                "clients": len(accepted),
                "asked": len(chosen),
                "up_bytes": sum(answer.up_bytes for answer in accepted) + (secure.up_bytes if secure else 0),
                "down_bytes": down_bytes + (secure.down_bytes if secure else 0),
                "seconds": time.monotonic() - started,
                "guard_seconds": intake.guard_seconds,
                "head": self.ledger.head,
                **({"secure": secure.figures()} if secure else {}),
                **self.privacy.facts([answer.loss for answer in accepted]),
            }
        )

    def _asked(self, number: int, clients: list[str], progress: float, group_of: GroupOf) -> dict[str, Request]:
        """What each of these clients is sent to train on."""
        rule = self.plan.aggregation
        more: tuple[bytes, ...] = ()
        if isinstance(rule, SeedSum) and rule.selection == "amplitude":
            more = (pack_probabilities(probabilities(self._state.aggregation, self.plan.num_directions)),)
        body: Facts = {"round": number, "progress": progress, **({"probabilities": True} if more else {})}
        ask, work = self._roster.request, self._pace.asked
        return {c: ask("train", c, {**body, **work(c, group_of(c)), **self._orders.of(c)}, more) for c in clients}

    def _first(self, number: int, chosen: list[str], enough: int, requests: dict[str, Request]) -> dict[str, Request]:
        """Whose answers come first where nobody is slow: drawn, so that no name is preferred."""
        if enough >= len(chosen):
            return requests
        order = stream(self.plan.recipe.seed, "arrival", number).permutation(len(chosen))
        first = {chosen[i] for i in order[:enough]}
        return {client: request for client, request in requests.items() if client in first}

    def _secure(self, number: int) -> SecureRound | None:
        if not self.plan.recipe.secure_aggregation.enabled:
            return None
        return SecureRound(self.plan, number, self.ledger, self.exchange, self.folder, self.emit, self.replica.shapes)

    def _count_stages(self, secure: SecureRound) -> None:
        self.tally.up_bytes += secure.up_bytes
        self.tally.down_bytes += secure.down_bytes
        for client in secure.lost:
            self._roster.known.pop(client, None)  # ask it again what it holds

    def _intake(self, number: int, group_of: GroupOf) -> Intake:
        lateness, context = Lateness(self.plan.recipe, self.ledger), self.replica.context(number)
        gathering = self.privacy.gather(context)
        return Intake(self.plan, number, lateness, self._guard, self._book, context, group_of, gathering)

    def _collect(self, number: int, requests: dict[str, Request], intake: Intake | SecureRound, enough: int) -> None:
        """Each reply is taken in as it arrives, up to the one that is `enough`; what stays is a line about it."""
        requests = requests if enough > 0 else {}
        silent = set(requests)
        with closing(self._at_work.answers(requests, self.plan.recipe.deadline_s)) as replies:
            for client, reply in replies if enough > 0 else ():
                silent.discard(client)
                try:
                    answer = intake.take(client, reply)
                except WireError as error:
                    self._roster.known.pop(client, None)  # ask it again what it holds
                    self._lost(number, client, "error", str(error))
                    continue
                self._roster.note(client, reply)
                self._accepted(number, answer, reply.body)
                if client in requests:  # with as much to do as the others
                    self._pace.note(client, requests[client].body, reply.body.get("seconds"))
                enough -= client in requests or not requests
                if enough == 0:
                    silent.clear()  # the rest are not needed, which is no fault of theirs
                    break
        self._at_work.end(number)
        for client in sorted(silent - self._at_work.on.keys()):
            self._roster.known.pop(client, None)
            self.emit({"event": "client", "round": number, "client": client, "status": "missing"})

    def _accepted(self, number: int, answer: Answer, facts: dict[str, Any]) -> None:
        self.tally.count(answer)
        self._orders.note(answer.client, facts)
        if self.privacy.tells_clients:
            told = {"event": "client", "round": number, "client": answer.client, "status": "ok"}
            self.emit({**told, "up_bytes": answer.up_bytes, **numbers(facts)})

    def _lost(self, number: int, client: str, status: str, why: str) -> None:
        self.emit({"event": "client", "round": number, "client": client, "status": status, "why": why})

    def _judged(self, number: int, intake: Intake | SecureRound) -> list[Answer]:
        early = set(intake.refused)
        accepted = intake.judge()
        for client in sorted(set(intake.refused) - early):
            self._lost(number, client, "refused", intake.refused[client])
        if self._guard.enabled:
            self.emit(intake.event())
        return accepted

    def _commit(self, number: int, intake: Intake | SecureRound) -> None:
        result = outcome(self.plan, self.replica, self._state, self._gate, number, intake)
        if result.rejected is not None:
            self.emit({"event": "rejected", "round": number, "why": result.rejected})
        self.replica.apply(number, result.payload)
        self._orders.settle(part.client for part in result.contributions)
        self._state.save(number, self.tally)
        self._book.sync()
        contributions = self.privacy.contributions(result.contributions)
        with self.privacy.releasing(number):
            record = self.ledger.append(self.plan.root(number), result.payload, contributions)
        self._guard.remember([record])

    # -- evaluation -------------------------------------------------------------------------------------------

    def evaluate(self, number: int) -> EvaluationReport:
        """Quality of the current state, on the server's rows or summed over the clients' own held-out rows."""
        down_bytes = 0
        if self._evaluate is not None:
            report = self._evaluate(self.replica)
        elif self.plan.privacy is not None:
            report = EvaluationReport.from_sums({})  # clients do not tell what they measure
        else:
            free = self._roster.known.keys() - self._at_work.on.keys()  # who is at work is sent nothing else
            requests = {c: self._roster.request("evaluate", c, {}) for c in self._present() if c in free}
            down_bytes = self._roster.count_down(requests)
            sums = {}
            for client, reply in self.exchange.exchange(requests, self.plan.recipe.deadline_s):
                if reply.error is None:
                    sums[client] = reply.body
                    self._roster.note(client, reply)
                else:
                    self.emit({"event": "client", "client": client, "status": "error", "why": reply.error})
            report = EvaluationReport.from_sums(sums, self.plan.recipe.evaluation.min_clients)
        self.emit({"event": "evaluation", "round": number, "down_bytes": down_bytes, **report.to_json()})
        return report
