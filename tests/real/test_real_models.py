"""The embedded SmolLM2-135M: converted, mapped, fluent, measured the same way on any number of threads, exported."""

import pytest
import torch

from kilotune.core.rng import stream
from kilotune.core.types import Batch
from kilotune.engine.model.base import load_base, weights_digest
from kilotune.engine.model.export import export_model
from kilotune.engine.model.generation import generate, stream_tokens
from kilotune.engine.model.loss import answer_loss

pytestmark = pytest.mark.real

BASE = "smollm2-135m"


@pytest.fixture(scope="module")
def base():
    return load_base(BASE)


def ask(base, text):
    turns = [{"role": "user", "content": text}]
    return base.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


def answers(base, tokens=48):
    """Tokens whose labels are the second half of each row, rows of differing length."""
    rng = stream(0, "real-batch")
    ids = torch.from_numpy(rng.integers(3, 49152, (6, tokens)))
    mask = (torch.arange(tokens)[None] < tokens - 3 * torch.arange(6)[:, None]).long()
    labels = torch.where((mask == 1) & (torch.arange(tokens) >= tokens // 2), ids, -100)
    return Batch(ids, labels, mask)


def test_the_embedded_model_is_complete_and_its_digest_is_that_of_its_weights(base):
    """Kills: tied head stored as a second tensor; a remembered digest of other weights."""
    params = base.parameters()
    assert len(params) == 272 and sum(p.numel() for p in params.values()) == 134_515_008
    assert weights_digest(params) == base.digest
    assert base.model.get_output_embeddings().weight is params["model.embed_tokens.weight"]


def test_the_tokenizer_splits_digits_and_knows_its_template(base):
    """Kills: the pre-tokenizer lost in conversion (numbers and the blanks before them would be split differently)."""
    pieces = base.tokenizer.tokenize("at  2024")
    assert pieces == ["at", "ĠĠ", "2", "0", "2", "4"]
    text = base.tokenizer.decode(ask(base, "hi"))
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert base.tokenizer.pad_token_id is not None and base.tokenizer.eos_token == "<|im_end|>"


def test_it_answers_and_stops(base):
    """Kills: weights put in the wrong order (rotary halves swapped), an end of turn that is not seen."""
    prompt = ask(base, "What is the capital of France? Answer in one short sentence.")
    answer = generate(base.model, base.tokenizer, [prompt], 40)[0]
    assert "Paris" in answer and len(base.tokenizer(answer)["input_ids"]) < 40
    assert "".join(stream_tokens(base.model, base.tokenizer, prompt, max_new_tokens=40)) == answer


def test_answer_loss_equals_the_loss_over_all_logits(base):
    """Kills: a difference that only shows at 49,152 words and 30 layers."""
    batch = answers(base)
    with torch.no_grad():
        logits = base.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        flat, labels = logits[:, :-1].reshape(-1, logits.shape[-1]), batch.labels[:, 1:].reshape(-1)
        expected = torch.nn.functional.cross_entropy(flat, labels, ignore_index=-100)
        torch.testing.assert_close(answer_loss(base.model, batch), expected, atol=0, rtol=1e-5)


def test_gradients_do_not_depend_on_the_number_of_threads(base):
    """Kills: matrix products or sums that are split by threads."""
    batch, before, seen = answers(base), torch.get_num_threads(), []
    base.model.requires_grad_(True)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss = answer_loss(base.model, batch)
            loss.backward()
            grads = {name: param.grad for name, param in base.parameters().items()}
            seen.append((float(loss.detach()), weights_digest(grads)))
            base.model.zero_grad(set_to_none=True)
    finally:
        torch.set_num_threads(before)
        base.model.requires_grad_(False)
    assert seen[0] == seen[1] == seen[2]


def test_export_reads_back_with_the_same_digest(base, tmp_path):
    """Kills: an export whose weights or names are not those of the base."""
    export_model(base.model, base, tmp_path / "out")
    again = load_base(str(tmp_path / "out"), writable=True)
    assert again.digest == base.digest
