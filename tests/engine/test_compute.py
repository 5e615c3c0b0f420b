"""Checkpointing changes memory, never a number; bfloat16 is used where it is asked for or measured to be faster."""

import pytest
import torch

from kilotune.engine.model import compute
from kilotune.engine.model.compute import Compute
from kilotune.engine.training.step import BatchObjective
from tiny import tiny_batch, tiny_llama


def gradients(how):
    model = tiny_llama().requires_grad_(True)
    (part,) = BatchObjective(model, [tiny_batch()], how).parts()
    loss = part()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def test_checkpointing_gives_the_same_bits_and_leaves_the_model_as_it_was():
    """Kills: a layer that is skipped or run with other arguments the second time; a patch that stays."""
    loss, kept = gradients(Compute())
    again, remade = gradients(Compute(checkpointing=1.0))
    assert torch.equal(loss, again)
    assert all(torch.equal(kept[name], remade[name]) for name in kept)
    model = tiny_llama()
    with Compute(checkpointing=1.0).around(model):
        assert "forward" in vars(model.model.layers[0])
    assert "forward" not in vars(model.model.layers[0])


def test_checkpointing_keeps_one_tensor_for_its_share_of_the_layers():
    """Kills: a switch that does nothing or all. Counted in saved numbers, not in bytes of the process."""
    saved = {}
    for how in (Compute(), Compute(checkpointing=0.5), Compute(checkpointing=1.0)):
        model, numbers = tiny_llama(num_hidden_layers=6).requires_grad_(True), []

        def pack(tensor, numbers=numbers):
            numbers.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            BatchObjective(model, [tiny_batch(rows=8, tokens=30)], how).parts()[0]()
        saved[how.checkpointing] = sum(numbers)
    assert saved[1.0] < 0.5 * saved[0.0]
    assert saved[1.0] + saved[0.0] == pytest.approx(2 * saved[0.5], rel=1e-3)


def test_bfloat16_is_close_and_not_equal():
    """Kills: a switch that does nothing; gradients in a format the optimizer does not expect."""
    loss, exact = gradients(Compute())
    near, rounded = gradients(Compute(bfloat16=True))
    assert near != loss
    assert near == pytest.approx(float(loss), rel=0.05)
    for name, gradient in exact.items():
        assert rounded[name].dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(rounded[name].flatten(), gradient.flatten(), dim=0)
        assert cosine > 0.95, name


def test_auto_follows_the_measurement(monkeypatch):
    """Kills: a guess by processor name; a format taken for a small gain."""
    for factor, expected in ((2.0, "bf16"), (1.1, "fp32"), (0.5, "fp32")):
        clock = iter(v for seconds in (factor, 1.0) for _ in range(compute.TRIES) for v in (0.0, seconds))
        monkeypatch.setattr(compute.time, "perf_counter", lambda clock=clock: next(clock))
        compute.faster_precision.cache_clear()
        assert compute.faster_precision() == expected
    compute.faster_precision.cache_clear()
