"""Laws of every way to train: nothing changes at attachment, rollback restores every bit, a change replays."""

import pytest
import torch

from kilotune.basis.seeds import Seeds
from kilotune.basis.tiled import Tiled
from kilotune.core.errors import RecipeError
from kilotune.core.registry import find, names
from kilotune.core.rng import stream
from kilotune.engine.model.loss import answer_loss
from kilotune.engine.training.step import BatchObjective, Memory, train_step
from kilotune.estimator.backprop import Backprop
from kilotune.estimator.zeroth_order import ZerothOrder
from kilotune.optimizer.adamw import AdamW
from kilotune.optimizer.sgd import SGD
from tiny import tiny_batch, tiny_llama

BASES = {"tiled": Tiled(size=64), "seeds": Seeds(size=8)}
CASES = [(name, basis) for name in names("parametrization") for basis in (BASES if name == "subspace" else ["none"])]


def attach(name: str, basis: str, seed: int = 0, **fields):
    model = tiny_llama(seed)
    kind = find("parametrization", name)
    method = kind(**kind.example, **fields)
    return method.attach(model, basis=BASES.get(basis), seed=3)


def bits(trainable) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainable.state().items()}


def train(trainable, steps: int = 3, forward_only: bool = False):
    estimator = ZerothOrder(epsilon=1e-2) if forward_only else Backprop()
    optimizer = SGD(lr=1e-3) if forward_only else AdamW(lr=1e-2)
    memory = Memory.empty()
    for step in range(steps):
        objective = BatchObjective(trainable.model, [tiny_batch(step)])
        train_step(trainable, estimator, optimizer, objective, memory, 1.0, stream(0, "t", step))


@pytest.mark.parametrize(("name", "basis"), [case for case in CASES if find("parametrization", case[0]).neutral])
def test_the_output_at_attachment_is_the_base_models(name, basis):
    """Kills: an adapter that does not start at zero."""
    batch = tiny_batch()
    expected = answer_loss(tiny_llama(), batch)
    torch.testing.assert_close(answer_loss(attach(name, basis).model, batch), expected, atol=0, rtol=0)


@pytest.mark.parametrize("forward_only", [False, True])
@pytest.mark.parametrize(("name", "basis"), CASES)
def test_rollback_restores_every_bit(name, basis, forward_only):
    """Kills: undoing by subtraction; a scratch value left in the model."""
    trainable = attach(name, basis)
    before = bits(trainable)
    trainable.begin(11, forward_only)
    train(trainable, forward_only=forward_only)
    assert any(change.any() for change in trainable.update().tensors.values())
    trainable.rollback()
    after = bits(trainable)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(change.any() for change in trainable.update().tensors.values())


@pytest.mark.parametrize(("name", "basis"), CASES)
def test_applying_an_update_elsewhere_gives_what_training_gave(name, basis):
    """Kills: an update that is not after - before; an apply under another root."""
    here, there = attach(name, basis), attach(name, basis)
    here.begin(11)
    train(here)
    trained = answer_loss(here.model, tiny_batch(9))
    there.apply(here.update().tensors.items(), 11)
    torch.testing.assert_close(answer_loss(there.model, tiny_batch(9)), trained, atol=1e-5, rtol=1e-5)
    assert not torch.equal(trained, answer_loss(tiny_llama(), tiny_batch(9)))


@pytest.mark.parametrize(("name", "basis"), CASES)
def test_training_with_backprop_lowers_the_loss_and_leaves_no_gradient(name, basis):
    """Kills: a sign error; gradients kept after their use."""
    trainable = attach(name, basis)
    batch = tiny_batch(1)
    trainable.begin(11)
    before = float(answer_loss(trainable.model, batch))
    memory = Memory.empty()
    for step in range(12):
        objective = BatchObjective(trainable.model, [batch])
        train_step(trainable, Backprop(), AdamW(lr=5e-3), objective, memory, 1.0, stream(0, "t", step))
    assert float(answer_loss(trainable.model, batch)) < before - 0.05
    assert all(param.grad is None and not param.requires_grad for param in trainable.model.parameters())


@pytest.mark.parametrize(("name", "basis"), CASES)
def test_eight_micro_batches_are_one_batch(name, basis):
    """Kills: means of means; gradients that are not summed; only the last micro-batch counted."""
    whole, parts = attach(name, basis), attach(name, basis)
    rows = tiny_batch(5, rows=8)
    cut = [
        type(rows)(rows.input_ids[i : i + 1], rows.labels[i : i + 1], rows.attention_mask[i : i + 1]) for i in range(8)
    ]
    for trainable, batches in ((whole, [rows]), (parts, cut)):
        trainable.begin(11)
        objective = BatchObjective(trainable.model, batches)
        train_step(trainable, Backprop(), SGD(lr=0.1), objective, Memory.empty(), 1.0, stream(0, "t"))
    one, other = whole.update().tensors, parts.update().tensors
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=2e-6, rtol=2e-4)


@pytest.mark.parametrize(("name", "basis"), CASES)
def test_restore_takes_over_the_state_of_another_replica(name, basis):
    here, there = attach(name, basis), attach(name, basis)
    here.begin(11)
    train(here)
    there.restore(bits(here))
    assert all(torch.equal(value, there.state()[key]) for key, value in here.state().items())


def test_subspace_gradients_are_the_projected_full_gradient():
    """Kills: a missing rms scale; the gradient of one tensor counted for another."""
    trainable = attach("subspace", "tiled")
    model, batch = tiny_llama().requires_grad_(True), tiny_batch(2)
    answer_loss(model, batch).backward()
    expected = torch.zeros(64)
    for key, param in model.named_parameters():
        scale = max(float(param.detach().double().square().mean().sqrt()), 1e-4)
        expected += scale * BASES["tiled"].project(param.grad.contiguous(), key, 11)
    got = {}
    trainable.begin(11)
    Backprop().estimate(
        BatchObjective(trainable.model, [batch]), trainable, stream(0), {}, lambda n, g: got.update({n: g.clone()})
    )
    torch.testing.assert_close(got["coords"], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["full", "subspace"])
def test_targets_select_tensors_and_a_wrong_one_names_the_nearest(name):
    trainable = attach(name, "tiled" if name == "subspace" else "none", targets=("q_proj", "model.layers.1.mlp.*"))
    assert len(trainable.sources()) == 2 + 3
    with pytest.raises(RecipeError, match=r"'q_prj' matched none of \d+ tensors. Did you mean 'q_proj'"):
        attach(name, "tiled", targets=("q_prj",))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "lorra"}, "Did you mean 'lora'"),
        ({"config": {"rank": 4}}, "parametrization.config.rank: lora has no such key"),
        ({"config": {"r": 4, "target_modules": ["q_prj"]}}, "q_prj"),
    ],
)
def test_a_wrong_peft_method_or_key_is_one_clear_line(fields, message):
    with pytest.raises(RecipeError, match=message):
        attach("peft", "none", **fields)


@pytest.mark.parametrize("method", ["ia3", "vera"])
def test_other_peft_methods_need_no_code_of_ours(method):
    """Kills: a parametrization that only knows LoRA."""
    config = {
        "ia3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        "vera": {"r": 4},
    }
    trainable = attach("peft", "none", method=method, config=config[method])
    trainable.begin(1)
    train(trainable)
    assert any(change.any() for change in trainable.update().tensors.values())
