"""Export: what is written equals what is in memory, and what does not is not written."""

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine.tiny_tokenizer import tiny_tokenizer
from kilotune.core.errors import ModelError
from kilotune.core.rng import stream
from kilotune.engine.model import export
from kilotune.engine.model.base import load_base, weights_digest
from kilotune.engine.model.export import export_model, export_peft, merged
from tiny import save_tiny, tiny_llama

TOKENS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return load_base(str(save_tiny(tmp_path / "tiny", seed=1)), writable=True)


def adapted(base, config):
    """The base with an adapter whose numbers are all different from zero."""
    with torch.random.fork_rng():
        model = get_peft_model(base.model, config).eval()
    for name, param in model.named_parameters():
        if param.requires_grad:
            param.data = 0.1 * torch.from_numpy(stream(0, name).standard_normal(tuple(param.shape))).float()
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def test_an_exported_model_reads_back_to_the_bit(base, tmp_path):
    """Kills: tied weights stored twice; the base written in place of the tuned weights; a lost template."""
    for name, param in base.parameters().items():
        param.data.add_(torch.from_numpy(stream(2, name).standard_normal(tuple(param.shape))).float(), alpha=0.01)
    export_model(base.model, base, tmp_path / "out")
    again = load_base(str(tmp_path / "out"))
    assert again.digest == weights_digest(base.parameters()) != base.digest
    assert torch.equal(logits(again.model), logits(base.model))
    assert again.tokenizer.chat_template == tiny_tokenizer().chat_template
    with safe_open(str(tmp_path / "out" / "model.safetensors"), framework="pt") as file:
        assert sorted(file.keys()) == sorted(base.parameters())


LORA = LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
IA3 = IA3Config(task_type="CAUSAL_LM")
PROMPT = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


@pytest.mark.parametrize("config", [LORA, IA3], ids=["lora", "ia3"])
def test_merged_reloaded_and_adapted_logits_agree(base, tmp_path, config):
    """Kills: an adapter forgotten or folded in twice; merging that changes the run's own model."""
    model = adapted(base, config)
    plain, before = logits(tiny_llama(1)), logits(model)
    assert (before - plain).abs().max() > 0.1
    whole = merged(model)
    torch.testing.assert_close(logits(whole), before, atol=1e-4, rtol=1e-4)
    export_model(model, base, tmp_path / "out")
    torch.testing.assert_close(logits(load_base(str(tmp_path / "out")).model), before, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("config", [LORA, IA3, PROMPT], ids=["lora", "ia3", "prompt"])
def test_a_peft_folder_gives_the_adapter_back(base, tmp_path, config):
    """Kills: an adapter saved without its numbers, or bound to another base."""
    from peft import PeftModel

    model = adapted(base, config)
    export_peft(model, base, tmp_path / "out")
    again = PeftModel.from_pretrained(tiny_llama(1), str(tmp_path / "out"))
    assert torch.equal(logits(again), logits(model))
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == base.name


def test_a_wrong_export_never_appears(base, tmp_path, monkeypatch):
    """Kills: a gate that looks at file names, or compares the model with itself."""
    real = export.read_model

    def tampered(change):
        def read(name, stage):
            file = stage / "model.safetensors"
            tensors = load_file(file)
            save_file(change(tensors), file, metadata={"format": "pt"})
            return real(name, stage)

        monkeypatch.setattr(export, "read_model", read)
        with pytest.raises(ModelError) as error:
            export_model(base.model, base, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
        return str(error.value)

    one = "model.layers.1.self_attn.k_proj.weight"
    flipped = {"flip": lambda t: {**t, one: -t[one]}, "cut": lambda t: {n: v for n, v in t.items() if n != one}}
    assert "written weights differ" in tampered(flipped["flip"])
    assert "lack 1 tensors" in tampered(flipped["cut"])


def test_logits_that_differ_stop_an_adapter_too(base, tmp_path):
    """Kills: adapters whose method changed the base, exported without that change."""
    model = adapted(base, LORA)
    base.parameters()["model.norm.weight"].data.mul_(1.5)
    with pytest.raises(ModelError, match="logits differ from the original"):
        export_peft(model, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_of_nan_is_not_exported(base, tmp_path):
    """Kills: a comparison that NaN passes."""
    base.parameters()["model.norm.weight"].data.fill_(float("nan"))
    with pytest.raises(ModelError, match="logits differ"):
        export_model(base.model, base, tmp_path / "out")


def test_a_merge_that_changes_the_model_is_refused(base, monkeypatch):
    """Kills: trusting merge_and_unload."""
    model = adapted(base, LORA)

    def forgets(self, **_):
        return self.unload()

    monkeypatch.setattr("peft.tuners.tuners_utils.BaseTuner.merge_and_unload", forgets)
    with pytest.raises(ModelError, match="merged lora: logits differ from the original"):
        merged(model)


def test_what_cannot_be_exported_says_what_can(base, tmp_path):
    """Kills: a traceback from inside peft; a folder of someone else's files deleted."""
    with pytest.raises(ModelError, match="this model has none"):
        export_peft(base.model, base, tmp_path / "out")
    with pytest.raises(ModelError, match="'prompt_tuning' cannot be merged into the weights"):
        export_model(adapted(base, PROMPT), base, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelError, match="exists and is no exported model"):
        export_model(base.model, base, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_an_earlier_export_is_replaced(base, tmp_path):
    """Kills: files of an older export that stay among the new ones."""
    export_model(base.model, base, tmp_path / "out")
    (tmp_path / "out" / "old.txt").write_text("")
    export_model(base.model, base, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out" / "old.txt").exists()
