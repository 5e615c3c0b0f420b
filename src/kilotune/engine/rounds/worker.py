"""Worker: one client's side of a round. It keeps its data and its state; what leaves is one payload per round.

Everything a round needs beyond the request follows from (recipe, client name, round), so a client that is killed
and asked again answers with the same bytes.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Event

from kilotune import __version__
from kilotune.core.errors import DataError, FederationError, KilotuneError, RunError, WireError
from kilotune.core.rng import stream
from kilotune.core.types import SeedUpdate, State, TensorUpdate, Update
from kilotune.engine.composing.plan import Plan
from kilotune.engine.flower.messages import Facts, Reply, Request
from kilotune.engine.memory import peak_rss
from kilotune.engine.model.evaluation import EvaluationReport
from kilotune.engine.partial.device import Device
from kilotune.engine.partial.splitclient import SplitClient
from kilotune.engine.privacy.privatesteps import private_steps
from kilotune.engine.rounds.ahead import Begun, foresee, foreseen, work_of
from kilotune.engine.rounds.bounds import coefficient_limit, finite, prober, said_by, step_stream, vocabulary_of
from kilotune.engine.rounds.clientstate import Answer, ClientState, RoundLog
from kilotune.engine.rounds.following import (
    Link,
    Part,
    head_after,
    keep_parts,
    kept_parts,
    missed_parts,
    require_own,
    require_same_run,
)
from kilotune.engine.rounds.identity import HistoryError
from kilotune.engine.rounds.ledger import MEMBERS_BYTES
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rounds.streaming import OwnWeights
from kilotune.engine.rows.tokenize import Example
from kilotune.engine.secure.client import Vault
from kilotune.engine.secure.participant import Participant, new_vault
from kilotune.engine.training.objectives import objectives
from kilotune.engine.training.step import Memory, StepReport, pairs, train_step

Evaluate = Callable[[Replica, list[Example]], EvaluationReport]
Progress = Callable[[str], None]


class Worker:
    """Answers the server's requests for one client."""

    def __init__(
        self,
        name: str,
        replica: Replica,
        genesis: str,
        train: Sequence[Example],
        held_out: list[Example],
        evaluate: Evaluate,
        folder: Path,
        keeps_rounds: bool,
        progress: Progress = lambda line: None,
        checkpoint: Path | None = None,
        log: RoundLog | None = None,
        link: Link | None = None,
        reopen: Callable[[], Replica] | None = None,
        vault: Vault | None = None,
        split: SplitClient | None = None,
    ) -> None:
        """`genesis` is the hash of the ledger's header; `keeps_rounds`: store received rounds to replay after a
        restart (a client of its own) instead of relying on the run's ledger (a simulated one). `checkpoint`: start
        from this state instead of the base. `log` holds the answers of clients that remember nothing; `link` may
        know heads that were computed before. `reopen` gives a replica at round 0, to start again when what this
        client holds is not the server's history. `vault`: where the secrets of secure aggregation outlive this
        object; by default they do not. `split`: the parts of the model that a client holds without its body."""
        self.name, self.replica, self.folder = name, replica, folder
        self.train, self.held_out, self._evaluate, self._progress = train, held_out, evaluate, progress
        self._keeps_rounds, self._log, self._link = keeps_rounds, log, link or partial(head_after, replica.plan)
        self._genesis, self._reopen, self._split = genesis, reopen, split
        self._state = ClientState(folder)
        self._private = private_steps(replica.plan, folder, len(train))
        self._secure: Participant | None = None
        if replica.plan.recipe.secure_aggregation.enabled:
            vault = vault or new_vault(replica.plan, genesis, name, folder if keeps_rounds else None)
            self._secure = Participant(replica.plan, name, vault)
        self._begun: Begun | None = None  # the next round, where steps of it were taken ahead
        self._trained: Facts | None = None  # what was asked of the last round
        self.round, self.head = 0, genesis
        if checkpoint is not None:
            self.head = replica.load(checkpoint)
            self.round = replica.round
        if keeps_rounds:
            self._follow(*kept_parts(folder, (self.round, self.head), self._link))

    def handle(self, request: Request) -> Reply:
        """One request, one reply; what goes wrong for a known reason comes back as the reply's error."""
        actions = {"hello": self._hello, "train": self._train, "evaluate": self._test, "finish": self._finish}
        if self._secure is not None:
            actions |= dict.fromkeys(("secure.keys", "secure.shares", "secure.unmask"), self._beside_training)
        try:
            if request.kind not in actions:
                raise WireError(f"request: got kind {request.kind!r}, expected one of {', '.join(actions)}.")
            require_same_run(self.name, self.replica, request)
            return actions[request.kind](request)
        except HistoryError:
            raise  # a server that contradicts what it signed is not answered any more
        except DataError:
            raise  # rows that cannot be read are not the round's fault: whoever owns them has to mend them
        except KilotuneError as error:
            if isinstance(error, RunError) and not self._keeps_rounds:
                raise  # the disk is the run's own: to go on without this client would change the result
            return Reply(body={}, error=str(error))

    # -- requests ---------------------------------------------------------------------------------------------

    def _hello(self, request: Request) -> Reply:
        return Reply(body={"client": self.name, "version": __version__, **self._standing()})

    def _beside_training(self, request: Request) -> Reply:
        assert self._secure is not None, "asked for with secure aggregation only"
        body: Facts = {"round": self.round, "attempt": request.body.get("attempt", "")}
        return Reply(body=body, payloads=self._secure.answer(request))

    def _standing(self) -> dict[str, str | int | float]:
        counts = {"round": self.round, "num_examples": len(self.train), "num_held_out": len(self.held_out)}
        if self._secure is not None:
            counts = {"round": self.round}  # how many rows there are is part of the sum
        return {"head": self.head} | counts | (self._private.facts() if self._private else {})

    def _train(self, request: Request) -> Reply:
        started = time.monotonic()
        number = int(request.body["round"])
        payloads = list(request.payloads)
        mail = payloads.pop() if self._secure is not None and payloads else b""
        probabilities = payloads.pop() if request.body.get("probabilities") else None
        self._catch_up(request, payloads)
        if not self.train:
            raise FederationError(f"client {self.name!r} has no training rows.")
        if self._secure is not None:
            self._secure.require_keys(request)
        answer = self._answered(number)
        if answer is None:
            answer = self._compute(number, request, probabilities)
        self._trained = request.body
        payload, facts = answer
        if self._secure is not None:
            payload, facts = self._secure.masked(request, mail, payload), {"attempt": str(request.body["attempt"])}
        body: dict[str, str | int | float | bool] = {
            **self._standing(),
            **facts,
            "seconds": time.monotonic() - started,
            "peak_rss_bytes": peak_rss(),
        }
        return Reply(body=body, payloads=(payload,))

    def _test(self, request: Request) -> Reply:
        if self.replica.plan.privacy is not None:
            raise FederationError(f"client {self.name!r} does not tell what it measures on its own rows (privacy).")
        self._catch_up(request, list(request.payloads))
        report = self._evaluate(self.replica, self.held_out)
        return Reply(body={**self._standing(), **report.to_sums()})

    def _finish(self, request: Request) -> Reply:
        self._catch_up(request, list(request.payloads))
        self._begun = self._trained = None  # there is no next round
        digest = self.replica.digest() if self._keeps_rounds else "shared"
        return Reply(body={**self._standing(), "digest": digest, "peak_rss_bytes": peak_rss()})

    # -- rounds -----------------------------------------------------------------------------------------------

    def _catch_up(self, request: Request, parts: list[bytes]) -> None:
        first = int(request.body.get("first", self.round + 1))
        sent, wanted = list(enumerate(parts, start=first)), str(request.body["head"])
        try:
            missed = missed_parts(self.name, (self.round, self.head), sent, wanted, self._link)
        except WireError:
            if first > 1 or self._reopen is None:
                raise  # the server hears of it, asks which history this client holds and sends all of its own
            self.replica, self.round, self.head = self._reopen(), 0, self._genesis
            self._begun = self._trained = None
            missed = missed_parts(self.name, (self.round, self.head), sent, wanted, self._link)
        if self._keeps_rounds:
            require_own(self.name, self.replica, missed, lambda number: self._state.answer(number, self.head))
            keep_parts(self.folder, missed)
        self._follow(missed, wanted)

    def _follow(self, parts: list[Part], head: str) -> None:
        """Take these rounds; a replica that is shared may hold them already."""
        known = self.replica.round
        self.replica.replay((number, part[MEMBERS_BYTES:]) for number, part in parts if number > known)
        self.round, self.head = self.round + len(parts), head

    def _compute(self, number: int, request: Request, probabilities: bytes | None) -> Answer:
        if self.replica.round != number - 1:
            raise WireError(f"asked to train round {number}, but the model stands at round {self.replica.round}.")
        begun = self._begin(request.body)
        plan, memory, trainable = begun.work.plan, begun.memory, self.replica.trainable
        if self._private:
            self._private.charge(self.name, number, self.head, plan.recipe.local_steps)
        context = self.replica.context(number)
        if probabilities is not None:
            self.replica.draw_by(probabilities)
        with begun.entered(trainable) as own:
            work = partial(objectives, plan, self.replica, self.name, self.train, number, None)
            device = Device(plan, trainable, memory.units, request.body, work)
            with device.working():
                steps = self._steps(begun, own)
                own.keep()
            memory.weights |= trainable.own()
            update = self._update(plan, memory, steps, begun.work.factor)
            sending = replace(said_by(self.name, context), rng=stream(plan.recipe.seed, "codec", self.name, number))
            if self._secure is not None:
                payload = self._secure.integers(update, len(self.train), steps[-1].loss, number)
            else:
                payload = plan.uplink.encode(update, sending, begun.codec)
            if plan.optimizer.hears and isinstance(read := plan.uplink.decode(payload, context), TensorUpdate):
                memory.sent(plan.optimizer, read)
        memory.carry(plan.optimizer)
        facts = device.told({} if self._private else {"loss_first": steps[0].loss, "loss": steps[-1].loss})
        facts |= self._split.facts() if self._split is not None else {}
        self._remember(number, memory, begun.codec, (payload, facts))
        if self._private:
            self._private.settle()
        return payload, facts

    def ahead(self, asked: Event) -> None:
        """Between requests: steps of the round that is foreseen which need nothing of the last one, until `asked`."""
        if self._trained is None or (coming := foreseen(self.replica.plan, self._trained)) is None:
            return
        begun = self._begin(coming)
        if len(begun.reports) < begun.free and not asked.is_set():
            with begun.entered(trainable := self.replica.trainable) as own:
                foresee(self.replica, begun.work.number)
                self._steps(begun, own, asked)
                begun.weights = {name: value.clone() for name, value in trainable.wire.items()}
        self._begun = begun if begun.reports else None

    def _begin(self, asked: Facts) -> Begun:
        """The round that is asked for, or that will be: with the steps that were taken ahead of just this one."""
        work, begun = work_of(self.replica.plan, asked), self._begun
        self._begun = None
        if begun is not None and begun.work == work:
            return begun
        return Begun(work, *self._state.before(work.number))

    def _update(self, plan: Plan, memory: Memory, steps: list[StepReport], factor: float) -> Update:
        """What the round has come to, as it is sent."""
        if plan.uplink.takes == "tensors":
            update: Update = memory.outgoing(plan.optimizer, self.replica.trainable.update())
        else:
            update = pairs(steps, coefficient_limit(plan, vocabulary_of(self.replica.base.model), factor))
        if not finite(update) or (isinstance(update, SeedUpdate) and not update.coefs.size):
            raise FederationError(f"client {self.name!r}: training left no finite update. Lower optimizer.lr.")
        return update

    def _steps(self, begun: Begun, own: OwnWeights, asked: Event | None = None) -> list[StepReport]:
        """The reports of the local steps: of all, or of the free ones until something is `asked`. Those that a split
        takes before them are about another loss."""
        number, plan, factor = begun.work
        recipe, trainable, memory, reports = plan.recipe, self.replica.trainable, begun.memory, begun.reports
        if not begun.weights:
            memory.begin(plan.optimizer, trainable.wire, self.replica.public, recipe.local_steps)
        own.resume(begun.weights)
        if self._split is not None:
            work = self._split.objectives(plan, self.name, self.train, number)
        else:
            work = objectives(plan, self.replica, self.name, self.train, number, self._private)
        for step, objective in islice(enumerate(work), len(reports), None):
            if asked is not None and (step >= begun.free or asked.is_set()):
                break
            own.before_step(step)
            rng = step_stream(recipe, prober(plan, self.name), number, step)
            reports.append(train_step(trainable, plan.estimator, plan.optimizer, objective, memory, factor, rng))
            self._progress(f"round {number} step {step + 1}/{recipe.steps_per_round} {_told(reports[-1].loss)}")
        return reports[-recipe.local_steps :]

    # -- state on disk ----------------------------------------------------------------------------------------

    def _answered(self, number: int) -> Answer | None:
        logged = self._log.answer(self.name, number, self.head) if self._log is not None else None
        return logged or self._state.answer(number, self.head)

    def _remember(self, number: int, memory: Memory, codec: State, answer: Answer) -> None:
        plan = self.replica.plan
        if not plan.recipe.keep_optimizer:
            memory.optimizer.clear()
        carried = plan.uplink.carried(codec, plan.root(number + 1))
        remembered = memory.tensors() | {f"codec/{k}": v for k, v in carried.items()}
        if self._log is not None and not remembered and not self._state:
            self._log.add(self.name, number, self.head, answer)
        else:
            self._state.save(number, self.head, remembered, answer)


def _told(loss: float) -> str:
    return f"loss {loss:.3f}" if math.isfinite(loss) else ""
