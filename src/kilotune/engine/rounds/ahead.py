"""Ahead: a client takes the first steps of its next round while the answer of the last one is on its way.

With `streaming.overlap` it takes what a round has brought only after so many steps; where the server's rule foresees
what a round changes, it takes all steps of the next one. These need nothing but what it holds once it has answered, so
they are taken at once, while answer, result and requests travel. A request that comes before their end waits for the
step under way, and is gone on with from there. No bit of the result depends on it, and a client that is killed loses no
more than these steps.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from kilotune.core.trainable import Trainable
from kilotune.core.types import State
from kilotune.engine.composing.compose import for_group
from kilotune.engine.composing.plan import Plan
from kilotune.engine.flower.messages import Facts, Handler, Reply, Request
from kilotune.engine.partial.device import ordered
from kilotune.engine.rounds.pace import lighter
from kilotune.engine.rounds.replica import Replica
from kilotune.engine.rounds.streaming import OwnWeights, streams, unsteady
from kilotune.engine.training.step import Memory, StepReport, rate


class Work(NamedTuple):
    """What one client has to do in a round: the plan as it follows it, and the factor on its learning rate."""

    number: int
    plan: Plan
    factor: float


def work_of(plan: Plan, asked: Facts) -> Work:
    """What a request asks for."""
    plan = lighter(for_group(plan, int(asked["group"])), asked.get("share"))
    factor = rate(plan.recipe.lr_schedule, plan.recipe.warmup_frac, float(asked["progress"]))
    return Work(int(asked["round"]), ordered(plan, asked), factor)


def foreseen(plan: Plan, asked: Facts) -> Facts | None:
    """What a client that was asked this is asked next if nothing changes; None: nothing, or nothing it could begin."""
    number, progress = int(asked["round"]), float(asked["progress"])
    # How many rounds there are is the server's to say; its first request does not.
    rounds = round((number - 1) / progress) if progress > 0 else plan.recipe.rounds or 0
    if number >= rounds or not plan.schedule.everybody or not _free(plan):
        return None
    return {**asked, "round": number + 1, "progress": number / rounds}


def _free(plan: Plan) -> int:
    """Steps of a round that need nothing of the round before."""
    if streams(plan):
        return 0 if plan.optimizer.anchored else plan.recipe.streaming.overlap
    steady = not unsteady(plan) and not plan.recipe.arms.pruning
    return plan.recipe.local_steps if steady and plan.server_optimizer.foresees else 0


def foresee(replica: Replica, number: int) -> None:
    """Move the model to where a round begins, as far as the server's rule can say, before the last one was heard."""
    plan, trainable = replica.plan, replica.trainable
    if streams(plan) or replica.round == number - 1:
        return  # clients go on from weights of their own, or the round before was heard
    for name, public in replica.public.items():
        if (change := plan.server_optimizer.foresee(public)) is not None:
            trainable.move(name, change)


@dataclass
class Begun:
    """One client's round as far as its steps have come; `codec` is what the uplink remembers."""

    work: Work
    memory: Memory
    codec: State
    weights: State = field(default_factory=dict)  # after the steps taken ahead, until they are gone on from
    reports: list[StepReport] = field(default_factory=list)

    @property
    def free(self) -> int:
        """Steps that need nothing of the round before."""
        return _free(self.work.plan)

    @contextmanager
    def entered(self, trainable: Trainable) -> Iterator[OwnWeights]:
        """Inside, the model trains what this client trains in the round; after it, it is as it was."""
        number, plan, _ = self.work
        trainable.begin(plan.root(number), plan.estimator.forward_only)
        plan.parametrization.narrow(trainable)
        trainable.take_up(self.memory.weights)
        try:
            yield OwnWeights(plan, trainable, self.memory.weights, number)
        finally:
            trainable.rollback()


class Ahead:
    """A client's handler that works on between requests, in a thread of its own."""

    def __init__(self, handler: Handler, work: Callable[[threading.Event], None]) -> None:
        """`work` takes what steps it can, until it is through or the event is set."""
        self._handler, self._work = handler, work
        self._asked = threading.Event()
        self._thread: threading.Thread | None = None

    def handle(self, request: Request) -> Reply:
        """One request, one reply."""
        self.pause()
        reply = self._handler(request)
        self._asked.clear()
        self._thread = threading.Thread(target=self._run, name="ahead", daemon=True)
        self._thread.start()
        return reply

    def pause(self) -> None:
        """Wait for the step under way; there is no other until a request has been answered."""
        self._asked.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        with suppress(Exception):  # it will happen again when the round is asked for, and be told then
            self._work(self._asked)
