"""The loss on the answer equals the textbook computation over all logits, in value and in every gradient."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM

from kilotune.core.types import Batch
from kilotune.engine.model import loss
from kilotune.engine.model.loss import answer_loss, label_losses
from kilotune.parametrization._overlay import Overlay
from tiny import fill, tiny_batch, tiny_llama


def plain(model, batch, reduction="mean"):
    """The oracle: all logits, shifted labels, the mask as it is."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    logits = logits[:, -batch.input_ids.shape[1] :]
    flat, labels = logits[:, :-1].reshape(-1, logits.shape[-1]), batch.labels[:, 1:].reshape(-1)
    return torch.nn.functional.cross_entropy(flat, labels, ignore_index=-100, reduction=reduction)


def gradients(model, value):
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(value, list(trained.values())), strict=True))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradients_equal_the_full_logits(tied, reduction):
    """Kills: labels not shifted; padding attended to; head gradient lost for tied weights; mean over all tokens."""
    model, batch = tiny_llama(tie_word_embeddings=tied).double().requires_grad_(True), tiny_batch()
    got, expected = answer_loss(model, batch, reduction), plain(model, batch, reduction)
    torch.testing.assert_close(got, expected, atol=0, rtol=1e-12)
    oracle = gradients(model, expected)
    for name, gradient in gradients(model, got).items():
        torch.testing.assert_close(gradient, oracle[name], atol=1e-12, rtol=1e-9, msg=name)


def test_chunks_change_nothing(monkeypatch):
    """Kills: a chunk left out, counted twice, or its gradient written to another chunk's rows."""
    model, batch = tiny_llama().requires_grad_(True), tiny_batch()
    whole = answer_loss(model, batch)
    oracle = gradients(model, whole)
    monkeypatch.setattr(loss, "CHUNK_NUMBERS", 3 * 300)
    got = answer_loss(model, batch)
    torch.testing.assert_close(got, whole, atol=0, rtol=1e-6)
    for name, gradient in gradients(model, got).items():
        torch.testing.assert_close(gradient, oracle[name], atol=1e-5, rtol=1e-5, msg=name)


def test_never_more_logits_than_labels(monkeypatch):
    """Kills: a head that runs over all tokens."""
    model, batch = tiny_llama().requires_grad_(True), tiny_batch(rows=6, tokens=40, answer=0.1)
    answer_loss(model, batch)  # the first call also compares both ways on four tokens
    biggest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() and out.shape[-1] == 300 and out.shape[0] != 32:
                biggest.append(out.numel() // 300)
            return out

    with Watch():
        answer_loss(model, batch)
    assert max(biggest) == batch.num_labels


@pytest.mark.parametrize("chunk", [1 << 24, 3 * 300])
def test_an_adapter_on_the_head_gets_its_gradient(monkeypatch, chunk):
    """Kills: reading the head's weight past the adapter that wraps it."""
    monkeypatch.setattr(loss, "CHUNK_NUMBERS", chunk)
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(tie_word_embeddings=False), config).eval()
    batch = tiny_batch()
    got, expected = answer_loss(model, batch), plain(model, batch)
    torch.testing.assert_close(got, expected, atol=0, rtol=1e-5)
    oracle = gradients(model, expected)
    assert any("lm_head" in name for name in oracle)
    for name, gradient in gradients(model, got).items():
        torch.testing.assert_close(gradient, oracle[name], atol=1e-5, rtol=1e-4, msg=name)


def test_prompt_tuning_keeps_its_virtual_tokens():
    """Kills: going past PEFT's forward, where the virtual tokens are put in front."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), config).eval()
    batch = tiny_batch()
    got, expected = answer_loss(model, batch), plain(model, batch)
    torch.testing.assert_close(got, expected, atol=0, rtol=1e-5)
    assert gradients(model, got).keys() == gradients(model, expected).keys() != set()
    base = plain(model.get_base_model(), batch)
    assert abs(float(got.detach()) - float(base.detach())) > 1e-3


def test_an_adapter_that_works_in_pefts_forward_is_never_gone_past():
    """Kills: going past it because it changed nothing when it was new (activated LoRA finds its tokens in forward)."""
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], alora_invocation_tokens=[5])
    model, batch = get_peft_model(tiny_llama(), config).eval(), tiny_batch()
    batch.input_ids[:, 2] = 5
    answer_loss(model, batch)
    for param in (p for p in model.parameters() if p.requires_grad):
        param.data = torch.linspace(-1, 1, param.numel()).view(param.shape)
    expected = plain(model, batch)
    torch.testing.assert_close(answer_loss(model, batch), expected, atol=0, rtol=1e-5)
    with model.disable_adapter():
        assert abs(float(plain(model, batch)) - float(expected)) > 1e-3


def test_capped_logits_stay_capped():
    """Kills: head(body(x)) for a model that caps its logits afterwards (Gemma 2)."""
    with torch.random.fork_rng():
        config = Gemma2Config(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            final_logit_softcapping=1.0,
        )
        model = fill(Gemma2ForCausalLM(config), 0).requires_grad_(True)
    batch = tiny_batch()
    torch.testing.assert_close(answer_loss(model, batch), plain(model, batch), atol=0, rtol=1e-5)


def test_weights_seen_through_an_overlay_count_everywhere():
    """Kills: a head read past its module, so that a probe moves the embedding but not the tied head."""
    model, batch = tiny_llama(), tiny_batch()
    params = dict(model.named_parameters())
    before = answer_loss(model, batch)
    with torch.no_grad(), Overlay(model, params).over(lambda _, value, start, plus, minus: plus.copy_(value * 1.1)):
        seen = answer_loss(model, batch)
    with torch.no_grad():
        for param in params.values():
            param.mul_(1.1)
    torch.testing.assert_close(seen, answer_loss(model, batch), atol=0, rtol=1e-6)
    assert abs(float(seen) - float(before)) > 1e-3


def test_left_padding_is_masked():
    """Kills: dropping the mask where padding stands in front and is seen."""
    model, batch = tiny_llama(), tiny_batch(rows=1)
    length = int(batch.attention_mask.sum())
    padded = torch.nn.functional.pad
    left = Batch(
        padded(batch.input_ids[:, :length], (3, 0), value=7),
        padded(batch.labels[:, :length], (3, 0), value=-100),
        padded(batch.attention_mask[:, :length], (3, 0), value=0),
    )
    torch.testing.assert_close(answer_loss(model, left), plain(model, left), atol=0, rtol=1e-5)


def test_losses_by_token_sum_to_the_loss():
    """Kills: rows assigned to the wrong example."""
    model, batch = tiny_llama(), tiny_batch()
    result = label_losses(model, batch)
    torch.testing.assert_close(result.losses.sum(), answer_loss(model, batch, "sum"), atol=1e-4, rtol=0)
    for row in range(4):
        one = Batch(*(t[row : row + 1] for t in (batch.input_ids, batch.labels, batch.attention_mask)))
        expected = answer_loss(model, one, "sum")
        torch.testing.assert_close(result.losses[result.rows == row].sum(), expected, atol=1e-4, rtol=0)


def test_no_labels_is_zero_loss():
    """Kills: 0 / 0."""
    model, batch = tiny_llama().requires_grad_(True), tiny_batch()
    empty = Batch(batch.input_ids, torch.full_like(batch.labels, -100), batch.attention_mask)
    value = answer_loss(model, empty)
    value.backward()
    assert float(value.detach()) == 0.0
    assert label_losses(model, empty).losses.shape == (0,)


def test_backward_twice_is_refused():
    """Kills: a second backward pass that silently uses scaled gradients again."""
    model, batch = tiny_llama().requires_grad_(True), tiny_batch()
    value = answer_loss(model, batch)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        value.backward()
