"""Backprop: g = ∂L/∂w by reverse-mode differentiation, each tensor's gradient used and freed as it appears.

Source: Rumelhart, Hinton and Williams, "Learning representations by back-propagating errors", Nature 323 (1986);
    the fused use of gradients as in Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited
    Resources", arXiv 2306.09782.
Memory: activations, plus one gradient tensor at a time. With several micro-batches a parametrization that does not
    accumulate by itself keeps one full gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kilotune.estimator import Estimate, Estimator, Objective, Sink, State, Trainable

if TYPE_CHECKING:
    from torch import Tensor, nn


class Backprop(Estimator):
    gives = frozenset({"dense_grad"})

    def estimate(
        self, objective: Objective, trainable: Trainable, rng: np.random.Generator, state: State, sink: Sink
    ) -> Estimate:
        sources = trainable.sources()
        parts = objective.parts()
        names = {param: name for name, param in sources.items()}
        ready = False

        def hook(param: Tensor) -> None:
            if ready and param.grad is not None:
                gradient, param.grad = param.grad, None
                trainable.pull(names[param], gradient, sink)  # type: ignore[index]

        _require(sources, True)
        handles = [param.register_post_accumulate_grad_hook(hook) for param in sources.values()]
        total = 0.0
        try:
            for number, part in enumerate(parts, start=1):
                ready = trainable.accumulates or number == len(parts)
                loss = part()
                total += float(loss.detach())
                loss.backward()
            trainable.flush(sink)
        finally:
            for handle in handles:
                handle.remove()
            _require(sources, False)
        return Estimate(total)


def _require(sources: dict[str, nn.Parameter], value: bool) -> None:
    for param in sources.values():
        param.requires_grad_(value)
        param.grad = None


METHOD = Backprop
