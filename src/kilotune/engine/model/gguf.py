"""GGUF files: dequantised once to float32 safetensors with tokenizer and chat template, in the cache.

Dequantisation, tensor names and the tokenizer are transformers' work; the split of texts into words before the merges
is put right where transformers (5.23) knows no rule for the file's pre-tokenizer.
"""

from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from math import prod
from pathlib import Path
from typing import Any

from kilotune.core.errors import ModelError
from kilotune.engine.cache import build_folder, cache_folder, remembered, sha256_file
from kilotune.engine.memory import check_memory

__all__ = ["Progress", "converted_folder"]

Progress = Callable[[str], None]

VERSION = 1  # of the conversion: a change makes new folders
DIGIT_BY_DIGIT = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell"})
"""Pre-tokenizers of llama.cpp that split off every digit, then split words as GPT-2 does."""


def converted_folder(name: str, file: Path, limit_bytes: int | None, progress: Progress | None) -> Path:
    """The converted model; made on first use. The folder is named by the file's content, not by its place."""
    key = remembered("files", [file], lambda: sha256_file(file))[:16]
    folder = cache_folder() / "bases" / f"{file.stem}-{key}-v{VERSION}"

    def build(stage: Path) -> None:
        if progress is not None:
            progress(f"converting {file.name} to float32, once (about a minute for 135M weights)")
        _convert(name, file, stage, limit_bytes)

    build_folder(folder, build)
    return folder


def _convert(name: str, file: Path, stage: Path, limit_bytes: int | None) -> None:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(file))
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise ModelError(f"{file}: is no GGUF file that can be read ({error}).") from None
    numbers = sum(prod(int(side) for side in tensor.shape) for tensor in reader.tensors)
    check_memory(name, 4 * numbers, limit_bytes)
    kind = _text(reader, "tokenizer.ggml.pre")
    template = _text(reader, "tokenizer.chat_template")
    del reader

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kilotune.engine.model.lean import quietly

    place: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        with quietly(), redirect_stderr(StringIO()):  # its bar has no switch and would tear a live display
            tokenizer = AutoTokenizer.from_pretrained(**place)
            model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, NotImplementedError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{file}: transformers cannot convert it ({lines[0]}).") from None
    _save(model, tokenizer, kind, template, stage)


def _text(reader: Any, key: str) -> str | None:
    field = reader.get_field(key)
    return None if field is None else str(field.contents())


def _save(model: Any, tokenizer: Any, kind: str | None, template: str | None, stage: Path) -> None:
    from tokenizers import pre_tokenizers

    from kilotune.engine.model.lean import quietly

    if kind in DIGIT_BY_DIGIT:
        digits = pre_tokenizers.Digits(individual_digits=True)
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.chat_template = tokenizer.chat_template or template
    if hasattr(model.config, "quantization_config"):  # the weights are plain floats now; saving refuses otherwise
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.dtype = "float32"
    if model.generation_config is not None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    with quietly():
        model.save_pretrained(str(stage), max_shard_size="1000GB")
        tokenizer.save_pretrained(str(stage))
