"""A tiny Llama built in memory: 2 layers, width 32, 4 heads over 2 key-value heads, embedding and head tied."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.tiny_tokenizer import tiny_tokenizer
from kilotune.core.rng import stream
from kilotune.core.types import Batch


def fill(model: Any, seed: int) -> Any:
    """Give every parameter values of its own that depend on (seed, name) only."""
    for name, param in model.named_parameters():
        values = torch.from_numpy(stream(seed, "tiny", name).standard_normal(tuple(param.shape))).float()
        param.data = 1 + 0.1 * values if param.dim() == 1 else 0.2 * values
    return model.eval().requires_grad_(False)


def tiny_llama(seed: int = 0, vocab_size: int = 300, **changes: Any) -> LlamaForCausalLM:
    """Same seed, same weights; the global generator is left as it was. `changes` are fields of the configuration."""
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **(settings | changes)))
    return fill(model, seed)


def tiny_batch(seed: int = 0, rows: int = 4, tokens: int = 12, vocab_size: int = 300, answer: float = 0.4) -> Batch:
    """Rows of differing length, padded on the right; about `answer` of the tokens carry a label."""
    rng = stream(seed, "tiny-batch")
    input_ids = rng.integers(3, vocab_size, (rows, tokens))
    mask = (rng.integers(tokens // 2, tokens + 1, (rows, 1)) > range(tokens)).astype("int64")
    input_ids[mask == 0] = 0
    carries = (rng.random((rows, tokens)) < answer) & (mask == 1)
    labels = input_ids.copy()
    labels[~carries] = -100
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(labels), torch.from_numpy(mask))


def save_tiny(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """The tiny model and its tokenizer as a Hugging Face folder."""
    tiny_llama(seed, **changes).save_pretrained(str(folder))
    tiny_tokenizer().save_pretrained(str(folder))
    return folder
