"""Base models: any causal language model of transformers, by folder, hub id, GGUF file or alias.

A GGUF file is dequantised once to float32 in the cache; everything is then mapped into memory from safetensors, so
that a start costs no reading. All weights are float32, whatever the file holds. The base digest is over names, shapes
and float32 values of the weights: it does not depend on shards, file format or stored dtype.
"""

import hashlib
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kilotune.core.errors import ModelError
from kilotune.engine.cache import remembered
from kilotune.engine.memory import check_memory
from kilotune.engine.model import sources
from kilotune.engine.model.lean import quietly

__all__ = ["Base", "load_base", "load_tokenizer", "weights_digest"]

Progress = Callable[[str], None]


@dataclass
class Base:
    """A loaded model that nobody has trained yet. `digest` is that of the weights as they were loaded."""

    name: str
    path: Path
    model: Any  # a transformers causal language model, float32, in eval mode, without gradients
    tokenizer: Any
    digest: str
    mapped: bool = False  # weights are pages of the file, which a write would copy
    _parameters: dict[str, nn.Parameter] = field(default_factory=dict, repr=False)

    def parameters(self) -> dict[str, nn.Parameter]:
        """All weights sorted by name, tied ones once. Names stay those of the base when adapters are put in."""
        return dict(self._parameters)

    def forget(self, drops: Callable[[str], bool]) -> None:
        """Let go of the weights whose names `drops` tells, once the model is without them."""
        self._parameters = {name: param for name, param in self._parameters.items() if not drops(name)}


def load_base(
    name: str,
    *,
    revision: str | None = None,
    writable: bool = False,
    limit_bytes: int | None = None,
    progress: Progress | None = None,
    unread: Callable[[Path], Collection[str]] | None = None,
) -> Base:
    """The model and its tokenizer.

    With `writable` the weights lie in memory of their own; without, they are a private mapping of the file, read as
    they are used. Raises ModelError when the model cannot be found, is of no use here or will not fit in memory
    (`limit_bytes`, or what is free). `unread`: tensors of the folder that will never be used, which count only where
    reading the model copies them.
    """
    folder = sources.find_folder(name, revision, limit_bytes, progress)
    spared = unread(folder) if unread is not None and not writable else ()
    check_memory(name, sources.float32_bytes(folder, spared), limit_bytes)
    with quietly():
        model = sources.read_model(name, folder)
        tokenizer = _tokenizer(name, folder)
    model.eval().requires_grad_(False)
    parameters = dict(sorted(model.named_parameters()))
    if writable:
        _take_over(parameters, folder)
    digest = remembered("digests", sources.weight_files(folder), lambda: weights_digest(parameters))
    mapped = not writable and all(place.dtype == "F32" for place in sources.tensor_places(folder).values())
    return Base(name, folder, model, tokenizer, digest, mapped, parameters)


def load_tokenizer(name: str, *, revision: str | None = None) -> Any:
    """The tokenizer alone. Raises ModelError as `load_base`."""
    folder = sources.find_folder(name, revision, None, None)
    with quietly():
        return _tokenizer(name, folder)


def _tokenizer(name: str, folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"base {name!r}: its tokenizer cannot be loaded ({reason}).") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _take_over(parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
    """Give every weight memory of its own, read straight from the file: through the mapping both would be resident."""
    stored = sources.tensor_places(folder)
    for name, param in parameters.items():
        place = stored.get(name)
        if place is None or place.dtype != "F32" or place.shape != tuple(param.shape):
            param.data = param.data.clone()
            continue
        value = torch.empty(param.shape, dtype=torch.float32)
        with open(place.file, "rb") as file:
            file.seek(place.start)
            if file.readinto(value.view(-1).numpy().data.cast("B")) != value.numel() * 4:
                raise ModelError(f"{place.file}: ends within tensor {name!r}. Download or convert the model again.")
        param.data = value


# -- digest -----------------------------------------------------------------------------------------------------------


def weights_digest(params: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over names, shapes and float32 values: a hash per tensor, then the hash of these in order of names.

    Per tensor: name length uint32, name UTF-8, number of sides uint32, sides uint64, values float32, little-endian.
    """
    with ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads())) as pool:  # hashlib lets threads run beside
        parts = list(pool.map(_tensor_digest, *zip(*_ordered(params.items()), strict=True))) if params else []
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _ordered(items: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return sorted(items, key=lambda item: item[0])


def _tensor_digest(name: str, value: Tensor) -> bytes:
    raw = name.encode()
    head = struct.pack("<I", len(raw)) + raw + struct.pack(f"<I{value.dim()}Q", value.dim(), *value.shape)
    digest = hashlib.sha256(head)
    flat = value.detach().to(device="cpu", dtype=torch.float32).contiguous().view(-1)
    digest.update(flat.numpy().astype("<f4", copy=False).data.cast("B") if flat.numel() else b"")
    return digest.digest()
