"""Laws of every optimizer the registry finds."""

import pytest
import torch
from torch import Tensor

from kilotune.core.registry import find, names
from kilotune.optimizer import Optimizer, State
from kilotune.optimizer.sgd import SGD


def build(name: str) -> Optimizer:
    method = find("optimizer", name)
    return method(**method.example)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4)])
@pytest.mark.parametrize("name", names("optimizer"))
def test_the_change_is_float32_of_the_parameters_shape(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Kills: moments or changes in bfloat16; flattened results; a change that needs a gradient itself."""
    param = draw(0, *shape).to(dtype).requires_grad_()
    optimizer = build(name)
    delta = optimizer.update(draw(1, *shape).to(dtype), optimizer.init(param), param, 0.1)
    assert (delta.shape, delta.dtype, delta.requires_grad) == (param.shape, torch.float32, False)


@pytest.mark.parametrize("name", names("optimizer"))
def test_parameter_and_gradient_stay_bit_equal(name: str) -> None:
    """Kills: in-place weight decay on the parameter; a returned change that is the gradient or the state itself."""
    optimizer, param, gradient = build(name), draw(0, 7), draw(1, 7)
    state = optimizer.init(param)
    deltas = [optimizer.update(gradient, state, param, 0.1) for _ in range(3)]
    copies = [delta.clone() for delta in deltas]
    for delta in deltas:
        delta.zero_()
    assert torch.equal(param, draw(0, 7))
    assert torch.equal(gradient, draw(1, 7))
    again = optimizer.init(param)
    assert all(torch.equal(optimizer.update(gradient, again, param, 0.1), copy) for copy in copies)


@pytest.mark.parametrize("name", names("optimizer"))
def test_all_memory_is_in_the_state(name: str) -> None:
    """Kills: step counts or moments kept in the object, which a resumed run would lose."""
    param = draw(0, 7)
    first, state, saved = build(name), build(name).init(param), {}
    for step in range(4):
        if step == 2:
            saved = {key: value.clone() for key, value in state.items()}
        last = first.update(draw(step, 7), state, param, 0.1)
    for step in (2, 3):
        resumed = build(name).update(draw(step, 7), saved, param, 0.1)
    assert torch.equal(resumed, last)


@pytest.mark.parametrize("name", names("optimizer"))
def test_zero_gradient_and_zero_parameter_give_no_change(name: str) -> None:
    """Kills: 0 / 0 in the second moment's root."""
    optimizer, zeros = build(name), torch.zeros(7)
    assert torch.equal(optimizer.update(zeros, optimizer.init(zeros), zeros, 0.1).abs(), zeros)


@pytest.mark.parametrize("name", names("optimizer"))
def test_the_number_of_threads_does_not_change_a_bit(name: str) -> None:
    """Kills: fused multiply-adds that only some elements get; a run's digest that depends on the machine's cores."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            optimizer, param = build(name), draw(0, 200_003)
            state = optimizer.init(param)
            results.append([optimizer.update(draw(step, 200_003), state, param, 1e-3) for step in range(3)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("name", names("optimizer"))
def test_the_numbers_kept_beside_a_parameter_are_as_promised(name: str) -> None:
    """Kills: a plan that forgets a rule's memory, or that of the rule it wraps."""
    optimizer, param = build(name), draw(0, 7)
    state = optimizer.init(param)
    optimizer.begin(param, state, {}, 2)
    assert sum(value.numel() == 7 for value in state.values()) == optimizer.copies


@pytest.mark.parametrize("name", names("optimizer"))
def test_what_everybody_makes_of_the_rounds_is_theirs_alone(name: str) -> None:
    """Kills: a public tensor that is what a round brought, or what it changed; foresight that moves on; a plan that
    forgets what everybody keeps."""
    rule, results = build(name), []
    for spoiled in (False, True):
        public: State = {}
        deltas = []
        for seed in range(5):
            change, foreseen = draw(seed, 7), rule.foresee(public)
            delta = rule.follow(change, public)
            assert torch.equal(change, draw(seed, 7))
            deltas.append(delta.clone())
            for tensor in (change, delta, foreseen) if spoiled else ():
                _ = tensor is None or tensor.zero_()
        results.append(torch.stack(deltas))
        assert sum(value.numel() == 7 for value in public.values()) == rule.public_copies
    assert torch.equal(*results)


@pytest.mark.parametrize("rule", [one for one in (SGD(), *map(build, names("optimizer"))) if one.by_parts])
def test_a_rule_that_takes_parts_changes_each_as_in_the_whole(rule: Optimizer) -> None:
    """Kills: a rule that says it goes by parts, but remembers, or looks at the whole tensor."""
    param, gradient = draw(0, 3, 5), draw(1, 3, 5)
    assert rule.init(param) == {}
    whole = rule.update(gradient, {}, param, 0.1).view(-1)
    flat, pulls = param.view(-1), gradient.view(-1)
    parts = [rule.update(pulls[a : a + 4], {}, flat[a : a + 4], 0.1) for a in range(0, 15, 4)]
    assert torch.equal(torch.cat(parts), whole)
