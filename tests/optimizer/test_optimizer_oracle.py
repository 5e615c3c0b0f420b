"""SGD and AdamW against torch.optim, and what their state weighs."""

from typing import Any

import pytest
import torch

from kilotune.optimizer import Optimizer
from kilotune.optimizer.adamw import AdamW
from kilotune.optimizer.sgd import SGD

CASES: list[tuple[Optimizer, type[torch.optim.Optimizer], dict[str, Any]]] = [
    (SGD(), torch.optim.SGD, {}),
    (SGD(weight_decay=0.1), torch.optim.SGD, {"weight_decay": 0.1}),
    (SGD(momentum=0.9), torch.optim.SGD, {"momentum": 0.9}),
    (SGD(momentum=0.9, weight_decay=0.1), torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    (
        SGD(momentum=0.9, nesterov=True, weight_decay=0.1),
        torch.optim.SGD,
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ),
    (AdamW(), torch.optim.AdamW, {"weight_decay": 0.0}),
    (AdamW(weight_decay=0.1), torch.optim.AdamW, {"weight_decay": 0.1}),
    (AdamW(betas=(0.8, 0.9), eps=1e-3), torch.optim.AdamW, {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.0}),
    (AdamW(betas=(0.0, 0.5)), torch.optim.AdamW, {"betas": (0.0, 0.5), "weight_decay": 0.0}),
]


def quadratic_gradient(param: torch.Tensor, step: int) -> torch.Tensor:
    """A known gradient that depends on where we are and on the step."""
    return param * (1 + step) - torch.arange(param.numel(), dtype=param.dtype).reshape(param.shape) / 7


@pytest.mark.parametrize(("ours", "theirs", "settings"), CASES)
def test_eight_steps_with_a_changing_rate_equal_torch(
    ours: Optimizer, theirs: type[torch.optim.Optimizer], settings: dict[str, Any]
) -> None:
    """Kills: a missing bias correction; decay of the gradient instead of the weight; lr inside the momentum buffer.

    Bound: float64 rounding of eight short steps.
    """
    start = torch.linspace(-2, 3, 12, dtype=torch.float64).reshape(3, 4)
    param, reference = start.clone(), torch.nn.Parameter(start.clone())
    state, oracle = ours.init(param), theirs([reference], lr=1.0, **settings)
    for step in range(8):
        lr = 0.02 / (1 + step)
        oracle.param_groups[0]["lr"] = lr
        reference.grad = quadratic_gradient(reference.detach(), step)
        oracle.step()
        param.add_(ours.update(quadratic_gradient(param, step), state, param, lr))
    torch.testing.assert_close(param, reference.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("optimizer", "per_number", "fixed"), [(SGD(), 0, 0), (SGD(momentum=0.5), 4, 0), (AdamW(), 8, 8)]
)
def test_state_weighs_what_the_docstring_says(optimizer: Optimizer, per_number: int, fixed: int) -> None:
    """Kills: a third moment, bfloat16 parameters with wide state, or a step count per number."""
    for dtype in (torch.float32, torch.bfloat16):
        state = optimizer.init(torch.zeros(1000, dtype=dtype))
        assert sum(value.nbytes for value in state.values()) == 1000 * per_number + fixed


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts tensors of full size that operations make afresh."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.data_ptr() for tensor in known}
        self.kept: list[torch.Tensor] = []  # alive, so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() > 1 and out.data_ptr() not in self.known:
            self.known.add(out.data_ptr())
            self.kept.append(out)
        return out


@pytest.mark.parametrize("optimizer", [case[0] for case in CASES])
def test_a_step_makes_one_tensor_the_returned_change(optimizer: Optimizer) -> None:
    """Kills: temporaries of the embedding's size: 113 MB each for 28M numbers."""
    param, gradient = torch.ones(1000), torch.ones(1000)
    state = optimizer.init(param)
    with Allocations(param, gradient, *state.values()) as counter:
        delta = optimizer.update(gradient, state, param, 0.1)
    assert [tensor.data_ptr() for tensor in counter.kept] == [delta.data_ptr()]


@pytest.mark.parametrize("betas", [(-0.1, 0.9), (0.9, 1.0)])
def test_betas_outside_their_range_are_refused(betas: tuple[float, float]) -> None:
    """Kills: a division by zero in the bias correction."""
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        AdamW(betas=betas)
