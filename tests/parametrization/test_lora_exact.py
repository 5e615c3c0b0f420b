"""FFA-LoRA, LoRA-SB and pairs of factors: what is averaged is the average of the changes of the weights."""

import numpy as np
import pytest
import torch

from kilotune.core.errors import RecipeError
from kilotune.core.factors import A, factor_pairs, with_product
from kilotune.core.rng import stream
from kilotune.core.types import TensorUpdate
from kilotune.engine.model.fused import fuse
from kilotune.engine.model.loss import answer_loss
from kilotune.engine.training.step import BatchObjective, Memory, train_step
from kilotune.estimator.backprop import Backprop
from kilotune.optimizer.adamw import AdamW
from kilotune.parametrization.lora_merged import LoraMerged
from kilotune.parametrization.lora_pairs import LoraPairs
from kilotune.parametrization.lora_sb import LoraSb
from kilotune.parametrization.peft import Peft
from tiny import tiny_batch, tiny_llama

FFA = Peft(config={"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}, freeze=("lora_A",))
SB = LoraSb(rank=16)


def attached(method, seed=3):
    return method.attach(tiny_llama(), basis=None, seed=seed)


def trained(method, batch, rank=None, steps=3):
    """A trainable after some steps of a round on rows of its own."""
    trainable, memory = attached(method), Memory.empty()
    trainable.begin(11)
    if rank is not None:
        type(method)(rank=rank).narrow(trainable)
    for step in range(steps):
        objective = BatchObjective(trainable.model, [tiny_batch(batch)])
        train_step(trainable, Backprop(), AdamW(lr=1e-2), objective, memory, 1.0, stream(0, "t", step))
    return trainable


def changes(trainable) -> dict[str, np.ndarray]:
    """B A of every adapted layer as peft would merge it, in float64."""
    params = {name: param.data.double() for name, param in trainable.model.named_parameters()}
    return {a: (params[b] @ params[a]).numpy() for b, a in factor_pairs(params)}


def test_with_a_frozen_the_mean_of_b_is_the_mean_of_the_changes():
    """Kills: A that differs between clients, moves, or travels."""
    clients = [trained(FFA, 1), trained(FFA, 2)]
    fresh = attached(FFA)
    rights = {name: param for name, param in fresh.model.named_parameters() if A in name}
    for client in clients:
        held = dict(client.model.named_parameters())
        assert all(torch.equal(held[name], value) for name, value in rights.items())
        assert client.wire.keys() == {name.replace("lora_A", "lora_B") for name in rights}
    updates = [client.update().tensors for client in clients]
    fresh.apply(((name, 0.25 * updates[0][name] + 0.75 * updates[1][name]) for name in fresh.wire), 11)
    first, second = changes(clients[0]), changes(clients[1])
    for name, change in changes(fresh).items():
        assert np.abs(change).max() > 1e-4
        np.testing.assert_allclose(change, 0.25 * first[name] + 0.75 * second[name], atol=1e-6)


def test_nothing_left_to_train_and_an_unknown_tensor_are_refused():
    with pytest.raises(RecipeError, match="leaves nothing to train"):
        attached(Peft(freeze=("lora_A", "lora_B")))
    with pytest.raises(RecipeError, match=r"parametrization.freeze: 'lora_C' matched none of 28 tensors"):
        attached(Peft(freeze=("lora_C",)))


def parts(trainable) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """B, R and A of every layer, by the layer's path in the base."""
    state = trainable.state()
    names = [name.removesuffix(".lora_R") for name in state if name.endswith(".lora_R")]
    return {n.split(".", 2)[-1]: tuple(state[f"{n}.lora_{part}"] for part in "BRA") for n in names}


def test_the_fixed_factors_are_the_leading_singular_vectors_and_only_r_travels():
    """Kills: factors that are not orthonormal; vectors of small singular values; B or A on the wire."""
    trainable, weights = attached(LoraSb(rank=8)), dict(tiny_llama().named_parameters())
    assert {tuple(value.shape) for value in trainable.wire.values()} == {(8, 8)}
    assert len(trainable.wire) == 2 * 7
    for path, (b, r, a) in parts(trainable).items():
        torch.testing.assert_close(b.T @ b, torch.eye(8), atol=1e-5, rtol=0)
        torch.testing.assert_close(a @ a.T, torch.eye(8), atol=1e-5, rtol=0)
        assert not r.any()
        weight = weights[f"{path}.weight"].double()
        left = weight - b.double() @ (b.double().T @ weight @ a.double().T) @ a.double()
        best = torch.linalg.svdvals(weight)[8:].norm()
        assert float(left.norm()) == pytest.approx(float(best), rel=1e-3, abs=1e-5)


def test_the_gradient_of_r_is_the_projection_of_the_weights_gradient():
    """Kills: the gradient of B R taken for R's; fused layers that do not know these factors."""
    trainable, full = trained(SB, 1), tiny_llama()
    fuse(trainable.model)
    for path, (b, r, a) in parts(trainable).items():
        full.get_parameter(f"{path}.weight").data += b @ r @ a
    full.requires_grad_(True)
    loss = answer_loss(full, tiny_batch(4))
    loss.backward()
    loss = loss.detach()
    got = {}
    estimate = Backprop().estimate(
        BatchObjective(trainable.model, [tiny_batch(4)]), trainable, stream(0), {}, lambda n, g: got.update({n: g})
    )
    assert estimate.loss == pytest.approx(float(loss), abs=1e-5)  # and merged is unmerged
    for name, gradient in got.items():
        b, _, a = parts(trainable)[name.removesuffix(".lora_R").split(".", 2)[-1]]
        weight = full.get_parameter(name.removesuffix(".lora_R").split(".", 2)[-1] + ".weight")
        torch.testing.assert_close(gradient, b.T @ weight.grad @ a.T, atol=1e-5, rtol=1e-4)
    assert len(got) == 14


def test_a_start_from_rows_is_the_best_approximation_of_the_first_full_step():
    """Kills: a gradient of one part only, or of the factors; a step of another size or sign; vectors cut wrongly."""
    method = LoraSb(rank=8, start="gradient", first_step=0.01)
    trainable, full = attached(method), tiny_llama()
    fuse(trainable.model)
    batches = [tiny_batch(1), tiny_batch(2)]
    method.prepare(trainable, BatchObjective(trainable.model, batches).parts(), seed=3)
    sum(part() for part in BatchObjective(full.requires_grad_(True), batches).parts()).backward()
    found = parts(trainable)
    assert len(found) == 14
    for path, (b, r, a) in found.items():
        step = -0.01 * full.get_parameter(f"{path}.weight").grad.sign().double()
        for factor in (b.T, a):
            torch.testing.assert_close(factor @ factor.T, torch.eye(8), atol=1e-5, rtol=0)
        left = float((b.double() @ r.double() @ a.double() - step).norm())
        assert left == pytest.approx(float(torch.linalg.svdvals(step)[8:].norm()), rel=1e-3)
    assert all(not p.requires_grad for name, p in trainable.model.named_parameters() if "base_layer" in name)
    assert all(np.abs(change).max() > 1e-3 for change in changes(trainable).values())  # and the model follows


def test_the_mean_of_r_is_the_mean_of_the_changes():
    """Kills: B R that does not follow R when a round is applied."""
    clients, there = [trained(SB, 1), trained(SB, 2)], attached(SB)
    updates = [client.update().tensors for client in clients]
    there.apply(((name, 0.25 * updates[0][name] + 0.75 * updates[1][name]) for name in there.wire), 11)
    for name, change in changes(there).items():
        first, second = changes(clients[0])[name], changes(clients[1])[name]
        np.testing.assert_allclose(change, 0.25 * first + 0.75 * second, atol=1e-6)
        assert np.abs(change).max() > 1e-4


def test_a_rank_above_a_layers_smaller_side_is_refused():
    with pytest.raises(RecipeError, match=r"got 17, expected at most 16, the smaller side of .*k_proj"):
        attached(LoraSb(rank=17))


def test_the_product_is_added_component_after_component_in_float32():
    """Kills: fused multiply-adds or sums in another order, whose bits depend on the machine."""
    rng = stream(0, "product")
    weight, b, a = (rng.normal(size=shape).astype(np.float32) for shape in [(5, 7), (5, 3), (3, 7)])
    expected = weight.copy()
    for k in range(3):
        expected += (b[:, k : k + 1] * np.float32(0.3)) * a[k : k + 1]
    got = with_product(*map(torch.from_numpy, (weight, b, a)), 0.3)
    assert got.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("method", [LoraMerged(rank=4), LoraPairs(rank=4)], ids=["merged", "kept"])
def test_a_client_of_lower_rank_trains_the_first_components_and_leaves_no_trace(method):
    """Kills: other components than the first ones; a narrowed adapter that stays."""
    whole, start = attached(method), {}
    whole.begin(11)
    start = {name: value.clone() for name, value in whole.wire.items()}
    client = trained(method, 1, rank=2, steps=1)
    for b, a in factor_pairs(client.wire):
        assert client.update().tensors[a].shape[0] == client.update().tensors[b].shape[1] == 2
        moved = (client.update().tensors[a] - start[a][:2]).abs().max()
        assert 0 <= float(moved) < 0.011  # one step of AdamW from the same start
    client.rollback()
    assert all(torch.equal(client.wire[name], value) for name, value in start.items())
    assert not any(value.any() for value in client.update().tensors.values())


def test_a_round_of_zeros_changes_nothing_and_every_merged_round_starts_afresh():
    """Kills: zeros taken for factors; the same A in every round; an adapter that outlives its round."""
    kept = attached(LoraPairs(rank=4))
    before = {name: value.clone() for name, value in kept.state().items()}
    kept.apply(((name, torch.zeros_like(value)) for name, value in kept.wire.items()), 11)
    assert all(torch.equal(value, before[name]) for name, value in kept.state().items())
    merged = trained(LoraMerged(rank=4), 1)
    update = TensorUpdate(merged.update().tensors)
    merged.rollback()
    merged.apply(update.tensors.items(), 11)
    weights = {name: value.clone() for name, value in merged.state().items()}
    starts = []
    for root in (12, 13, 12):
        merged.begin(root)
        starts.append({name: value.clone() for name, value in merged.wire.items()})
    for b, a in factor_pairs(merged.wire):
        assert torch.equal(starts[0][a], starts[2][a])
        assert not torch.equal(starts[0][a], starts[1][a])
        assert not starts[0][b].any()
        weight = tiny_llama().get_parameter(a.split(".", 2)[-1].partition(A)[0] + ".weight")
        expected = with_product(weight, update.tensors[b], update.tensors[a], 2.0)
        assert torch.equal(weights[a.partition(A)[0] + ".weight"], expected)
