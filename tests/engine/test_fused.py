"""Fused layers give the losses and gradients of the modules' own forwards, keep less, and stay away where unknown."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kilotune.core.rng import stream
from kilotune.engine.model.fused import fuse
from kilotune.engine.model.loss import answer_loss
from kilotune.engine.rows.batches import lay_out
from kilotune.engine.rows.tokenize import Example
from tiny import fill, tiny_batch, tiny_llama

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def other(config, model, **changes):
    with torch.random.fork_rng(devices=[]):
        return fill(model(config(**(SIZES | changes))), 0)


def with_lora(model, **changes):
    """Every factor random: a B of zeros would hide its half of the gradients."""
    settings = {"r": 3, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes
    adapted = get_peft_model(model, LoraConfig(**settings))
    for name, param in adapted.named_parameters():
        if "lora_" in name:
            param.data = torch.from_numpy(stream(1, name).standard_normal(tuple(param.shape))).float() * 0.2
    return adapted


MODELS = {
    "llama": tiny_llama,
    "llama with biases": lambda: tiny_llama(attention_bias=True, mlp_bias=True),
    "llama, as many keys as queries": lambda: tiny_llama(num_key_value_heads=4),
    "qwen2": lambda: other(Qwen2Config, Qwen2ForCausalLM),
    "qwen3": lambda: other(Qwen3Config, Qwen3ForCausalLM),
    "mistral": lambda: other(MistralConfig, MistralForCausalLM, sliding_window=None),
    "gemma": lambda: other(GemmaConfig, GemmaForCausalLM),
    "lora": lambda: with_lora(tiny_llama()),
    "lora without scaling": lambda: with_lora(tiny_llama(), lora_alpha=3),
    "dora": lambda: with_lora(tiny_llama(), use_dora=True),
    "two adapters": lambda: two_adapters(),
}


def two_adapters():
    model = with_lora(tiny_llama())
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "other"])
    return model


def results(model, batch):
    for name, param in model.named_parameters():
        param.grad = None
        param.requires_grad_("lora_" in name or not hasattr(model, "peft_config"))
    loss = answer_loss(model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def packed_batch():
    rng = stream(0, "packed")
    start = rng.integers(3, 300, 7)
    rows = []
    for i in range(4):
        tokens = torch.from_numpy(rng.integers(3, 300, 4 + i)).numpy()
        ids = [*start, *tokens] if i % 2 else [*tokens, 5]
        ids = torch.tensor(ids, dtype=torch.int32).numpy()
        labels = ids.copy()
        labels[: len(ids) // 2] = -100
        rows.append(Example(ids, labels, len(ids) // 2, "", None, i))
    (batch,) = lay_out(rows, 1024, 0, packed=True)
    assert batch.visible is not None
    return batch


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_losses_and_gradients_are_those_of_the_models_own_forward(kind, packed):
    """Kills: a wrong derivative anywhere; a scaling applied twice or not; a mask or positions left out."""
    batch = packed_batch() if packed else tiny_batch()
    model = MODELS[kind]()
    loss, gradients = results(model, batch)
    fuse(model)
    again, fused = results(model, batch)
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=0)
    assert gradients.keys() == fused.keys()
    assert len(fused) > 0
    for name, expected in gradients.items():
        assert (fused[name] - expected).abs().max() <= 2e-5 * expected.abs().max() + 1e-7, name


@pytest.mark.parametrize(
    ("kind", "norms", "others"),
    [("llama", 5, 4), ("qwen2", 5, 4), ("mistral", 5, 4), ("qwen3", 9, 2), ("gemma", 0, 2)],
)
def test_modules_that_are_known_are_fused_and_no_others(kind, norms, others):
    """Kills: a fusion that never takes place; query norms passed over (qwen3: its attention stays as it is); 1 + weight
    taken for weight, gelu taken for silu (gemma: only its attention is as usual)."""
    model = MODELS[kind]()
    fuse(model)
    fused = [module for module in model.modules() if "forward" in vars(module)]
    assert sum("Norm" in type(module).__name__ for module in fused) == norms
    assert sum("Norm" not in type(module).__name__ for module in fused) == others


def test_without_gradients_every_bit_is_the_models_own():
    """Kills: evaluation, probes and generation that change because training ran before."""
    model, batch = tiny_llama(), tiny_batch()
    with torch.no_grad():
        before = model(input_ids=batch.input_ids).logits
        fuse(model)
        assert torch.equal(model(input_ids=batch.input_ids).logits, before)


def kept(model):
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    numbers = {}

    def pack(tensor):
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            numbers[place] = tensor.untyped_storage().nbytes()  # what is kept twice is there once
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        answer_loss(model, tiny_batch(rows=8, tokens=30))
    return sum(numbers.values())


def test_fused_layers_keep_less():
    """Kills: activations kept that can be made again, or kept twice."""
    plain, fused = with_lora(tiny_llama()), with_lora(tiny_llama())
    fuse(fused)
    assert kept(fused) < 0.8 * kept(plain)


def test_hooks_and_dropout_take_the_modules_own_way():
    """Kills: a forward hook of another library that is never called; a dropout that is left out."""
    batch = tiny_batch()
    model = tiny_llama().requires_grad_(True)
    fuse(model)
    answer_loss(model, batch)  # looks at the model for the first time
    calls = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    answer_loss(model, batch)
    assert calls == [1]
    dropping = with_lora(tiny_llama(), lora_dropout=0.9)
    fuse(dropping)
    still = answer_loss(dropping.eval(), batch)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        assert answer_loss(dropping.train(), batch) != still


class Pretender(nn.Module):
    """Has the parts of an rms norm and does something else."""

    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.full((8,), 0.5)), 1e-6

    def forward(self, hidden_states):
        scale = hidden_states.square().mean(-1, keepdim=True).add(self.variance_epsilon).rsqrt()
        return hidden_states * scale * (1 + self.weight)


def test_a_module_that_computes_something_else_is_not_believed():
    """Kills: recognition by names alone."""
    model = nn.Sequential(Pretender())
    untouched = copy.deepcopy(model)
    fuse(model)
    x = torch.linspace(-1, 1, 16).view(2, 8)
    assert "forward" not in vars(model[0])
    assert torch.equal(model(x), untouched(x))
