"""The overlay against its oracle: a copy of the model whose weights really were changed."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kilotune.basis.seeds import Seeds
from kilotune.basis.tiled import Tiled
from kilotune.core.noise import noise
from kilotune.core.trainable import Direction
from kilotune.engine.model.loss import answer_loss
from kilotune.parametrization import _overlay
from kilotune.parametrization.full import Full
from kilotune.parametrization.peft import Peft
from kilotune.parametrization.subspace import Subspace
from tiny import fill, tiny_batch, tiny_llama

EPSILON = 2.0**-6
DIRECTION = Direction(3)
IDS = torch.tensor([[5, 9, 5, 299, 0, 17, 131], [2, 3, 4, 130, 131, 132, 133]])
METHODS = {
    "full": (Full(), None),
    "tiled": (Subspace(), Tiled(size=64)),
    "seeds": (Subspace(), Seeds(size=8)),
}


def attach(method: str, model):
    parametrization, basis = METHODS[method]
    trainable = parametrization.attach(model, basis=basis, seed=0)
    trainable.begin(11, forward_only=True)
    return trainable


def moved(method: str, model, sign: float):
    """A copy of the model with its weights changed by sign * EPSILON along DIRECTION."""
    other = copy.deepcopy(model)
    trainable = attach(method, other)
    for name, param in other.named_parameters():
        if method == "full":
            z = torch.from_numpy(noise("sign", DIRECTION.index, 0, name, 0, param.numel())).view(param.shape)
            param.data = param.data + sign * EPSILON * z
        else:
            coords = sign * EPSILON * trainable._scales[name] * trainable.basis.direction(DIRECTION.index)
            param.data = trainable.basis.add(param.data, name, [(11, coords)], out=torch.empty_like(param.data))
    return other


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_logits_are_bit_for_bit_those_of_a_model_with_changed_weights(method, tied):
    """Kills: a tensor left out or moved twice (tied head), rows of the embedding at the wrong place, a wrong sign."""
    model = tiny_llama(0, tie_word_embeddings=tied)
    trainable = attach(method, model)
    for sign in (1.0, -1.0):
        expected = moved(method, model, sign)(IDS).logits
        with trainable.perturbed(DIRECTION, sign * EPSILON):
            assert torch.equal(model(IDS).logits, expected)
    assert not torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("block", [41 * 32, 20])  # 300 rows are 7 blocks of 41 and one of 13; or each row is too long
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_blocks_that_do_not_divide_the_vocabulary_change_only_the_rounding(method, block, monkeypatch):
    """Kills: a last block that is dropped or too long, a wrong start of a block, a row that does not fit into one.

    Sums over 32 or 64 products.
    """
    monkeypatch.setattr(_overlay, "BLOCK", block)
    monkeypatch.setattr(_overlay, "GAP", 32)
    model = tiny_llama(0)
    trainable = attach(method, model)
    with trainable.perturbed(DIRECTION, EPSILON):
        got = model(IDS).logits
    expected = moved(method, model, 1.0)(IDS).logits
    torch.testing.assert_close(got, expected, atol=1e-6 * 64, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_both_sides_in_one_walk_have_the_bits_of_two_passes(method, tied):
    """Kills: halves that are swapped or mixed; the second part answered with the first one's hidden states."""
    model = tiny_llama(1, tie_word_embeddings=tied)
    trainable = attach(method, model)
    parts = [lambda b=tiny_batch(seed, rows): answer_loss(model, b, "sum") for seed, rows in ((0, 4), (1, 1), (2, 3))]
    calls = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    got = trainable.both(DIRECTION, EPSILON, parts)
    calls.clear()
    assert trainable.both(DIRECTION, EPSILON, parts) == got
    assert len(calls) == len(parts)
    handle.remove()
    for value, epsilon in zip(got, (EPSILON, -EPSILON), strict=True):
        with trainable.perturbed(DIRECTION, epsilon):
            assert value == sum(float(part()) for part in parts)
    assert got[0] != got[1]


@torch.no_grad()
def test_both_sides_start_from_where_the_round_has_come():
    """Kills: sides that mirror each other about the stored weights, which a forward-only round leaves behind."""
    model = tiny_llama(1)
    trainable, batch = attach("tiled", model), tiny_batch(0)
    here = torch.linspace(-0.05, 0.1, 64)
    trainable.move("coords", here)
    got = trainable.both(DIRECTION, EPSILON, [lambda: answer_loss(model, batch)])
    assert trainable._overlay._doubles is True  # sides that differ from two passes are noticed, and cost a second one
    for loss, sign in zip(got, (1.0, -1.0), strict=True):
        other = tiny_llama(1)
        coords = here + sign * EPSILON * trainable.basis.direction(DIRECTION.index)
        for name, param in other.named_parameters():
            trainable.basis.add(param.data, name, [(11, coords * trainable._scales[name])])
        assert loss == float(answer_loss(other, batch))
    assert got[0] != got[1]


@torch.no_grad()
def test_long_batches_make_two_passes_with_the_same_bits(monkeypatch):
    """Kills: twice the activations of a batch that fills the memory."""
    model = tiny_llama(1)
    trainable, batch = attach("tiled", model), tiny_batch(0)
    doubled = trainable.both(DIRECTION, EPSILON, [lambda: answer_loss(model, batch)])
    monkeypatch.setattr(_overlay, "DOUBLE_TOKENS", batch.input_ids.numel() - 1)
    shapes = []
    handle = model.model.layers[0].register_forward_hook(lambda module, inputs, output: shapes.append(inputs[0].shape))
    assert trainable.both(DIRECTION, EPSILON, [lambda: answer_loss(model, batch)]) == doubled
    handle.remove()
    assert shapes == [(*batch.input_ids.shape, 32)] * 2


class Centred(nn.Module):
    """Mixes the rows of a batch, so that a doubled one is another one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x - x.mean(0, keepdim=True))


@torch.no_grad()
def test_a_model_that_mixes_the_rows_of_a_batch_makes_two_passes():
    """Kills: doubling without looking whether it changes anything."""
    model, batch = tiny_llama(1), tiny_batch(0)
    model.model.layers[1].mlp = Centred(model.model.layers[1].mlp)
    trainable = attach("full", model)
    got = trainable.both(DIRECTION, EPSILON, [lambda: answer_loss(model, batch)])
    assert trainable._overlay._doubles is False
    for value, epsilon in zip(got, (EPSILON, -EPSILON), strict=True):
        with trainable.perturbed(DIRECTION, epsilon):
            assert value == float(answer_loss(model, batch))


@torch.no_grad()
def test_a_pass_that_fails_leaves_every_bit_and_every_forward():
    """Kills: weights or forwards that stay replaced when a pass is interrupted, even halfway through a module."""
    model = tiny_llama(0)
    trainable = attach("tiled", model)
    before = {name: (param, param.data_ptr(), param.data.clone()) for name, param in model.named_parameters()}
    for module in (model.model.norm, model.model.layers[1].mlp.up_proj, model.lm_head, model.model):
        handle = module.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        for probe in (lambda: trainable.both(DIRECTION, EPSILON, [lambda: model(IDS).logits.sum()]), None):
            with pytest.raises(KeyboardInterrupt), trainable.perturbed(DIRECTION, EPSILON):
                probe() if probe else model(IDS)
        handle.remove()
    assert all("forward" not in module.__dict__ for module in model.modules())
    for name, param in model.named_parameters():
        assert param is before[name][0]
        assert param.data_ptr() == before[name][1]
        assert torch.equal(param.data, before[name][2])
    assert torch.equal(model(IDS).logits, tiny_llama(0)(IDS).logits)


class Largest(TorchDispatchMode):
    """The most numbers that one operation has put into memory other than that of the given tensors."""

    def __init__(self, known) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self.known:
                self.numel = max(self.numel, out.untyped_storage().nbytes() // 4)
        return result


@torch.no_grad()
def test_a_probe_never_holds_a_whole_embedding(monkeypatch):
    """Kills: a scratch copy of the largest tensor, which would be a fifth of a small model's memory."""
    monkeypatch.setattr(_overlay, "BLOCK", 64 * 32)
    model = tiny_llama(0, vocab_size=3000)
    trainable, batch = attach("tiled", model), tiny_batch(0, rows=2, answer=0.2, vocab_size=3000)
    loss = lambda: answer_loss(model, batch)  # noqa: E731
    loss()
    with Largest(model.parameters()) as seen:
        trainable.both(DIRECTION, EPSILON, [loss])
    assert 0 < batch.num_labels * 3000 <= 16000 < model.lm_head.weight.numel()
    assert seen.numel <= 16000


class Nested(nn.Module):
    """Parameters of its own (two in a container), biases, and modules that it calls while they are replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(6))
        self.parts = nn.ParameterDict({"a": torch.empty(6), "b": torch.empty(6, 5)})
        self.first = nn.Linear(6, 6)
        self.second = nn.Conv1d(2, 2, 1)
        fill(self, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.first(x * self.scale)) + self.parts["a"]
        return self.first(y) @ self.parts["b"]


@pytest.mark.parametrize("targets", ["all", ("first",), ("*.bias", "parts.*"), ("first.weight",)])
@torch.no_grad()
def test_parameters_are_seen_wherever_they_are_kept(targets):
    """Kills: a container's parameters, a bias or a covered half of a module that the probe forgets."""
    model, x = Nested(), torch.linspace(-1, 1, 36).view(3, 2, 6)
    trainable = Full(targets=targets).attach(model, basis=None, seed=0)
    other = copy.deepcopy(model)
    for name, param in other.named_parameters():
        if name in trainable.params:
            z = torch.from_numpy(noise("sign", DIRECTION.index, 0, name, 0, param.numel())).view(param.shape)
            param.data = param.data + EPSILON * z
    with trainable.perturbed(DIRECTION, EPSILON):
        assert torch.equal(model(x), other(x))
    assert not torch.equal(model(x), other(x))


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("lora", {"r": 2, "target_modules": "all-linear"}),
        ("ia3", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    ],
)
@torch.no_grad()
def test_a_probe_of_an_adapter_sees_its_changed_values(method, config):
    """Kills: adapters kept in containers, of which a probe saw nothing, so that every slope was 0."""
    batch = tiny_batch(0)
    trainable = Peft(method=method, config=config).attach(tiny_llama(1), basis=None, seed=0)
    for i, value in enumerate(trainable.wire.values()):
        value.add_(0.01 * (i % 7))
    got = trainable.both(DIRECTION, EPSILON, [lambda: answer_loss(trainable.model, batch)])
    trainable.begin(0)
    for loss, sign in zip(got, (1.0, -1.0), strict=True):
        for name, value in trainable.wire.items():
            z = torch.from_numpy(noise("sign", DIRECTION.index, 0, name, 0, value.numel())).view(value.shape)
            value.add_(z, alpha=sign * EPSILON)
        assert loss == float(answer_loss(trainable.model, batch))
        trainable.rollback()
    assert got[0] != got[1]


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_the_number_of_threads_changes_no_bit(method):
    """Kills: blocks, runs or sums that follow the number of threads."""
    model = tiny_llama(2, vocab_size=3000, hidden_size=64, intermediate_size=256)
    trainable, batch = attach(method, model), tiny_batch(0, rows=4, tokens=40, vocab_size=3000)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            seen.append(trainable.both(DIRECTION, EPSILON, [lambda: answer_loss(model, batch)]))
    finally:
        torch.set_num_threads(before)
    assert seen[0] == seen[1]


def test_replaying_rounds_in_one_walk_gives_the_bits_of_one_after_the_other():
    """Kills: an order of rounds that changes, scales left out, stored weights written when they must not be."""
    rounds = [([("coords", torch.linspace(-1, 1, 64) / (root + 2))], root) for root in range(3)]
    one, other, fresh = (attach("tiled", tiny_llama(1)) for _ in range(3))
    stored = {name: param.data for name, param in fresh.params.items()}
    for changes, root in rounds:
        one.apply(changes, root)
    other.replay(rounds)
    fresh.replay(rounds, fresh=True)
    for name, base in tiny_llama(1).named_parameters():
        assert torch.equal(one.params[name].data, other.params[name].data)
        assert torch.equal(one.params[name].data, fresh.params[name].data)
        assert torch.equal(stored[name], base)
        assert not torch.equal(one.params[name].data, base)
