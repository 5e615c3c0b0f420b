"""Replica: one resident model that holds the state after some round of a ledger, and the worker that trains on it.

In a simulation all clients share one replica; deployed, each process has its own. A replica moves forward by
applying rounds in order, whether one (by difference), all (a newcomer) or after loading a checkpoint: the same
float32 operations in the same order, so the same bits.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

from torch import Tensor, nn

from kilotune.core.errors import WireError
from kilotune.core.trainable import Round, Trainable
from kilotune.core.types import SeedUpdate, State, TensorUpdate, Update, WireContext
from kilotune.engine.composing.plan import Plan
from kilotune.engine.files import read_tensors, write_tensors
from kilotune.engine.model.base import Base, weights_digest
from kilotune.engine.partial.middle import Middle, name_targets
from kilotune.engine.rounds.bounds import probes

PUBLIC = "public/"
ROUNDS_AT_ONCE = 256  # by then a walk over the weights costs little beside the additions themselves


class Replica:
    """A base with a plan attached to it."""

    def __init__(self, base: Base, plan: Plan, whole: bool = True) -> None:
        """With an emulator the model runs its thinned middle; `whole`: the full one can be put in its place."""
        self.base = base
        self.plan = plan
        self.middle = Middle(base, plan, whole) if plan.recipe.emulator.active else None
        self.trainable: Trainable = plan.parametrization.attach(base.model, basis=plan.basis, seed=plan.recipe.seed)
        self.round = 0
        self._mapped = base.mapped  # nothing was written yet: changed weights can go straight to new memory
        self.public: dict[str, State] = {}  # what the server's rule lets everybody know of the rounds, by wire tensor
        self.shapes = self.trainable.shapes()
        if self.middle is not None:
            name_targets(self.model)

    @property
    def model(self) -> nn.Module:
        return self.trainable.model

    def whole(self) -> AbstractContextManager[None]:
        """The full model inside, where clients have an emulator of it."""
        return self.middle.whole() if self.middle is not None else nullcontext()

    def context(self, round: int) -> WireContext:
        """What both ends know of a round without sending it."""
        known = partial(probes, self.plan, self.trainable, round)
        return WireContext(round, self.plan.root(round), self.shapes, self.plan.num_directions, probes=known)

    def draw_by(self, packed: bytes) -> None:
        """From here on, draw directions by the probabilities that a request gives."""
        from kilotune.aggregation.seed_sum import unpack_probabilities

        self.trainable.probabilities = unpack_probabilities(packed, self.plan.num_directions)  # type: ignore[attr-defined]

    def changes(self, update: Update, context: WireContext) -> Iterable[tuple[str, Tensor]]:
        """(wire tensor, change) pairs of a decoded update."""
        if isinstance(update, SeedUpdate) and self.plan.basis is not None:
            return coordinates(self.plan, update).tensors.items()
        return self.plan.downlink.expand(update, context)

    def apply(self, round: int, payload: bytes) -> None:
        """Move on by one round of the ledger."""
        self.trainable.apply(*self._decode(self.round + 1, round, payload))
        self._mapped = False
        self.round = round

    def replay(self, rounds: Iterable[tuple[int, bytes]]) -> None:
        """Move on by many rounds of the ledger, (number, payload) in order: the same bits as `apply` one by one.

        Over a basis a round is some numbers, so many are decoded first and then take one walk over the weights.
        """
        if not self.plan.parametrization.uses_basis:  # a round may be as large as the model
            for number, payload in rounds:
                self.apply(number, payload)
            return
        rest = iter(rounds)
        while some := list(islice(rest, ROUNDS_AT_ONCE)):
            decoded = [self._decode(self.round + 1 + at, *one) for at, one in enumerate(some)]
            self.trainable.replay(decoded, fresh=self._mapped)
            self._mapped = False
            self.round += len(some)

    def _decode(self, expected: int, number: int, payload: bytes) -> Round:
        if number != expected:
            raise WireError(f"round {number} does not follow round {expected - 1}, which this replica holds.")
        context = self.context(number)
        return self._followed(self.changes(self.plan.downlink.decode(payload, context), context)), context.root

    def _followed(self, changes: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, change in changes:
            yield name, self.plan.server_optimizer.follow(change, self.public.setdefault(name, {}))

    def digest(self) -> str:
        """Over every bit of the tuned tensors."""
        return weights_digest(self.trainable.state())

    def save(self, path: Path, head: str) -> None:
        """A checkpoint: the state's tensors, the round and the ledger's head they belong to."""
        public = {f"{PUBLIC}{name}/{key}": v for name, state in self.public.items() for key, v in state.items()}
        write_tensors(path, self.trainable.state() | public, {"round": str(self.round), "head": head})

    def load(self, path: Path) -> str:
        """Continue from a checkpoint; returns the head it belongs to. Raises WireError when the tensors do not fit."""
        found, facts = read_tensors(path)
        tensors = {name: value for name, value in found.items() if not name.startswith(PUBLIC)}
        state = self.trainable.state()
        if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in state.items()} or "head" not in facts:
            raise WireError(f"{path}: this checkpoint is of another model or method.")
        self.trainable.restore(tensors)
        for entry in found.keys() - tensors.keys():
            name, _, key = entry.removeprefix(PUBLIC).rpartition("/")
            self.public.setdefault(name, {})[key] = found[entry]
        self._mapped = False
        self.round = int(facts["round"])
        return facts["head"]


def coordinates(plan: Plan, update: SeedUpdate) -> TensorUpdate:
    """Pairs as the coordinates of the plan's basis."""
    if plan.basis is None:
        raise WireError("pairs arrived, but the recipe has no basis.")
    return TensorUpdate({"coords": plan.basis.coordinates(update)})
