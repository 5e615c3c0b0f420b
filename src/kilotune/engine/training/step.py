"""The only training step in the project: estimate, update, move, one tensor at a time."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from kilotune.core.choosing import chooser
from kilotune.core.trainable import Trainable
from kilotune.core.types import Batch, SeedUpdate, State, TensorUpdate
from kilotune.engine.model.compute import Compute
from kilotune.engine.model.loss import answer_loss, example_losses
from kilotune.estimator import Estimator, Objective
from kilotune.optimizer import Optimizer

DECAY = 0.5  # of the run; Hu et al. (MiniCPM), arXiv 2404.06395, take 0.1 of runs that are thousands of times longer


@dataclass(frozen=True)
class StepReport:
    """What one step saw. `index` and `coef` are the pair a forward-only step leaves in the seed log."""

    loss: float
    index: int | None = None
    coef: float = 0.0


def pairs(steps: list[StepReport], limit: float | None = None) -> SeedUpdate:
    """The seed log of forward-only steps; a step without a finite slope left none, none is larger than `limit`."""
    logged = [s for s in steps if s.index is not None]
    coefs = np.array([s.coef for s in logged], dtype=np.float32)
    if limit is not None:
        coefs = np.clip(coefs, np.float32(-limit), np.float32(limit))
    return SeedUpdate(np.array([s.index for s in logged], dtype=np.int64), coefs)


class BatchObjective(Objective):
    """Mean loss over the labelled tokens of a batch that is computed in micro-batches."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[Batch],
        compute: Compute = Compute(),
        release: Callable[[np.ndarray], float] | None = None,
    ) -> None:
        self._model, self.release = model, release
        self._batches = batches
        self._compute = compute
        self._count = sum(batch.num_labels for batch in batches)
        self._rows = sum(batch.num_examples for batch in batches)

    def parts(self) -> list[Callable[[], Tensor]]:
        return [partial(self._share, batch) for batch in self._batches]

    def examples(self) -> list[Callable[[], Tensor]]:
        return [partial(self._examples, batch) for batch in self._batches]

    def _examples(self, batch: Batch) -> Tensor:
        with self._compute.around(self._model):
            return example_losses(self._model, batch)

    def _share(self, batch: Batch) -> Tensor:
        with self._compute.around(self._model):
            loss = answer_loss(self._model, batch, "sum") / self._count
            choosing = chooser(self._model)
            return loss if choosing is None else loss + choosing.losses().sum() / self._rows


@dataclass
class Memory:
    """What the optimizer and the estimator remember between steps, weights of the client's own between rounds, and
    which units of the model it has."""

    optimizer: dict[str, State]
    estimator: State
    weights: State = field(default_factory=dict)
    units: State = field(default_factory=dict)

    @classmethod
    def empty(cls) -> "Memory":
        return cls({}, {})

    def tensors(self) -> State:
        """Flat, for a file: `optimizer/<wire tensor>/<key>`, `estimator/<key>`, `weights/<wire tensor>` and
        `units/<key>`."""
        flat = {f"optimizer/{w}/{k}": v for w, state in self.optimizer.items() for k, v in state.items()}
        flat |= {f"weights/{k}": v for k, v in self.weights.items()} | {f"units/{k}": v for k, v in self.units.items()}
        return flat | {f"estimator/{k}": v for k, v in self.estimator.items()}

    def begin(self, rule: Optimizer, wire: State, public: dict[str, State], steps: int) -> None:
        """A round of so many local steps starts at the wire tensors."""
        for name, param in wire.items():
            state = self.optimizer.setdefault(name, {}) or rule.init(param)
            rule.begin(param, state, public.get(name, {}), steps)
            self.optimizer[name] = state

    def outgoing(self, rule: Optimizer, update: TensorUpdate) -> TensorUpdate:
        """What the rule sends for what a round has come to."""
        return TensorUpdate(
            {n: rule.outgoing(change, self.optimizer.get(n, {})) for n, change in update.tensors.items()}
        )

    def sent(self, rule: Optimizer, update: TensorUpdate) -> None:
        """What was sent, as everybody reads it."""
        for name, change in update.tensors.items():
            rule.sent(change, self.optimizer[name])

    def carry(self, rule: Optimizer) -> None:
        """Keep what the next round needs."""
        self.optimizer = {name: rule.carried(state) for name, state in self.optimizer.items()}

    @classmethod
    def from_tensors(cls, flat: State) -> "Memory":
        memory = cls.empty()
        for path, value in flat.items():
            kind, _, rest = path.partition("/")
            if kind == "estimator":
                memory.estimator[rest] = value
            elif kind == "weights":
                memory.weights[rest] = value
            elif kind == "units":
                memory.units[rest] = value
            elif kind == "optimizer":
                wire, _, key = rest.rpartition("/")
                memory.optimizer.setdefault(wire, {})[key] = value
        return memory


def rate(schedule: str, warmup_frac: float, progress: float) -> float:
    """Factor on the learning rate at a fraction of the run in [0, 1)."""
    if progress < warmup_frac:
        return progress / warmup_frac if progress > 0 else 1e-2
    rest = (progress - warmup_frac) / (1 - warmup_frac)
    if schedule == "linear":
        return 1 - rest
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * rest))
    if schedule == "wsd":
        return min(1.0, (1 - rest) / DECAY)
    return 1.0


def train_step(
    trainable: Trainable,
    estimator: Estimator,
    optimizer: Optimizer,
    objective: Objective,
    memory: Memory,
    factor: float,
    rng: np.random.Generator,
) -> StepReport:
    """One optimizer step; `factor` multiplies the learning rate."""
    used = 0.0
    gathered: State = {}

    def sink(name: str, gradient: Tensor, start: int = 0) -> None:
        nonlocal used
        param = trainable.wire[name]
        if name not in memory.optimizer:
            memory.optimizer[name] = optimizer.init(param)
        end = start + gradient.numel()
        if gradient.numel() < param.numel():  # one part of several
            if optimizer.by_parts:
                param = param.view(-1)[start:end]
            else:
                gathered.setdefault(name, torch.empty_like(param)).view(-1)[start:end] = gradient
                if end < param.numel():
                    return
                gradient, start = gathered.pop(name), 0
        lr = _lr(optimizer, estimator, memory.estimator) * factor
        used = lr
        trainable.move(name, optimizer.update(gradient, memory.optimizer[name], param, lr), start)

    _lr(optimizer, estimator, memory.estimator)  # lets the estimator know that its rate will be asked for
    estimate = estimator.estimate(objective, trainable, rng, memory.estimator, sink)
    return StepReport(estimate.loss, estimate.index, float(np.float32(-used * estimate.slope)))


def _lr(optimizer: Optimizer, estimator: Estimator, state: State) -> float:
    if optimizer.lr != "auto":
        return float(optimizer.lr)
    return estimator.suggested_lr(state) or 0.0
