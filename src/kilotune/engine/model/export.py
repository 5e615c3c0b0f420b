"""Export: a model as a Hugging Face folder, an adapter as a PEFT folder; neither appears before it is proven.

Everything is written to a folder beside the target, read back from disk and compared with the model in memory: equal
weights to the bit, and logits on fixed tokens. Merging an adapter works on a copy and must keep the adapter's logits.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kilotune.core.choosing import chooser
from kilotune.core.errors import ModelError
from kilotune.core.rng import stream
from kilotune.engine.cache import staged_folder
from kilotune.engine.memory import check_memory
from kilotune.engine.model.base import Base, weights_digest
from kilotune.engine.model.lean import quietly
from kilotune.engine.model.sources import read_model
from kilotune.parametrization._prompts import SoftPrompts

__all__ = ["check_plain", "export_model", "export_peft", "merged"]

RELOAD_BOUND = 1e-4  # largest difference of logits, relative to the largest logit: same weights, other memory layout
MERGE_BOUND = 1e-3  # W x + B A x against (W + B A) x, rounded to float32 in every layer
PROBE = (2, 16)  # rows, tokens


def export_model(model: nn.Module, base: Base, folder: Path) -> None:
    """The whole model with tokenizer and chat template; an adapter is merged first.

    Raises ModelError, and leaves the folder as it was, when the method cannot be merged or a check fails.
    """
    check_plain(model)
    _check_target(folder)
    whole: Any = merged(model) if hasattr(model, "peft_config") else model
    tokens = _probe(whole)
    with staged_folder(folder) as stage:
        with quietly():
            whole.save_pretrained(str(stage), max_shard_size="5GB")
            base.tokenizer.save_pretrained(str(stage))
            again = read_model(str(folder), stage)
        again.eval()
        here, there = (weights_digest(dict(m.named_parameters())) for m in (whole, again))
        if here != there:
            raise ModelError(f"{folder}: the written weights differ from those in memory. Nothing was exported.")
        _compare(_logits(whole, tokens), _logits(again, tokens), RELOAD_BOUND, f"{folder}: re-read", "the original")


def export_peft(model: nn.Module, base: Base, folder: Path) -> None:
    """The adapter alone, as PEFT saves it; it is read back over a fresh copy of the base. Raises ModelError."""
    if not hasattr(model, "peft_config"):
        raise ModelError("a PEFT folder holds an adapter, but this model has none. Use --to hf.")
    _check_target(folder)
    tuned: Any = model
    tokens = _probe(tuned)
    with staged_folder(folder) as stage:
        with quietly():
            tuned.save_pretrained(str(stage), save_embedding_layers=False)
            base.tokenizer.save_pretrained(str(stage))
            fresh = read_model(base.name, base.path).requires_grad_(False)
            again = type(tuned).from_pretrained(fresh, str(stage))
        again.eval()
        _compare(_logits(tuned, tokens), _logits(again, tokens), RELOAD_BOUND, f"{folder}: re-read", "the original")


def merged(model: nn.Module) -> nn.Module:
    """A copy of an adapted model with the adapter folded into its weights. Raises ModelError when that changes it."""
    kind = _kind(model)
    check_memory(f"copy for merging {kind}", sum(4 * p.numel() for p in model.parameters()))
    tokens = _probe(model)
    before = _logits(model, tokens)
    twin: Any = copy.deepcopy(model)
    if not hasattr(twin, "merge_and_unload") and not hasattr(getattr(twin, "base_model", None), "merge_and_unload"):
        raise ModelError(f"peft method {kind!r} cannot be merged into the weights. Use --to peft.")
    try:
        whole: nn.Module = twin.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"peft method {kind!r} cannot be merged ({lines[0]}). Use --to peft.") from None
    _compare(before, _logits(whole, tokens), MERGE_BOUND, f"merged {kind}", "the original")
    return whole


def _kind(model: Any) -> str:
    config = next(iter(model.peft_config.values()))
    return str(getattr(config.peft_type, "value", config.peft_type)).lower()


def check_plain(model: nn.Module) -> None:
    """Raises ModelError for a model that does what no folder of weights can say."""
    more = ""
    if chooser(model) is not None:
        more = "chooses for every row what it adds to its base"
    elif any(isinstance(module, SoftPrompts) for module in model.modules()):
        more = "has vectors of its own in front of every row"
    if more:
        raise ModelError(
            f"this model {more}, which no plain model does. Use the run itself: kilotune evaluate, kilotune chat."
        )


def _check_target(folder: Path) -> None:
    """Only a folder that is absent, empty or an earlier export may be replaced."""
    if not folder.exists():
        return
    known = any((folder / name).exists() for name in ("config.json", "adapter_config.json"))
    if not folder.is_dir() or (any(folder.iterdir()) and not known):
        raise ModelError(f"{folder}: exists and is no exported model. Choose another folder.")


# -- the gate ---------------------------------------------------------------------------------------------------------


def _probe(model: Any) -> Tensor:
    """The fixed tokens on which models are compared."""
    return torch.from_numpy(stream(0, "export-probe").integers(0, model.config.vocab_size, PROBE))


@torch.no_grad()
def _logits(model: Any, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits[:, -tokens.shape[1] :]


def _compare(one: Tensor, other: Tensor, bound: float, what: str, against: str) -> None:
    """Refuses NaN as well: no comparison with it is true."""
    gap, scale = float((one - other).abs().max()), max(1.0, float(one.abs().max()))
    if not gap <= bound * scale:
        raise ModelError(
            f"{what}: logits differ from {against} by {gap:.3g}, expected at most {bound * scale:.3g}. "
            "Nothing was exported."
        )
