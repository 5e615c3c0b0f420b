"""Lean imports and building in memory leave everything as transformers alone would have it."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig, Qwen2Config

from engine.tiny_tokenizer import tiny_tokenizer
from kilotune.engine.model import lean, sources
from tiny import save_tiny

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def families(folder):
    """Models of several makes: tied and untied heads, rotary and learned positions, biases."""
    yield save_tiny(folder / "tied")
    yield save_tiny(folder / "untied", tie_word_embeddings=False)
    configs = {
        "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
        "mistral": MistralConfig(**SMALL, tie_word_embeddings=False),
        "gpt2": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    }
    for name, config in configs.items():
        with torch.random.fork_rng(devices=[]):
            AutoModelForCausalLM.from_config(config).save_pretrained(str(folder / name))
        tiny_tokenizer().save_pretrained(str(folder / name))
        yield folder / name


def test_a_model_read_is_the_one_that_transformers_loads(tmp_path):
    """Kills: buffers left empty, ties lost, a generation or attention setting that only `from_pretrained` makes."""
    tokens = torch.arange(3, 11)[None]
    for folder in families(tmp_path):
        with lean.quietly():
            ours = sources.read_model("x", folder)
            theirs = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
        for kind in ("named_parameters", "named_buffers"):
            mine, other = dict(getattr(ours, kind)()), dict(getattr(theirs, kind)())
            assert list(mine) == list(other), folder.name
            assert all(torch.equal(mine[name], other[name]) for name in other), folder.name
            assert all(mine[name].dtype == other[name].dtype for name in other), folder.name
        assert type(ours) is type(theirs)
        assert ours.config.to_dict() == theirs.config.to_dict()
        assert ours.config._attn_implementation == theirs.config._attn_implementation
        assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
        assert not ours.training
        with torch.no_grad():
            assert torch.equal(ours(input_ids=tokens).logits, theirs(input_ids=tokens).logits), folder.name


@pytest.mark.processes
def test_after_a_lean_import_the_compiler_is_there_and_was_not_loaded(tmp_path):
    """Kills: a stand-in that stays; decorators that stay switched off; a compiler that is imported all the same."""
    folder = save_tiny(tmp_path / "tiny")
    program = f"""
import sys, torch
from pathlib import Path
from kilotune.engine.model import lean, sources
before = torch.compiler.disable, torch.compiler.allow_in_graph
with lean.quietly():
    model = sources.read_model("x", Path({str(folder)!r}))
model(input_ids=torch.arange(4)[None])
assert not {{"torch._dynamo", "torch._inductor", "sympy", "torch.distributed.tensor"}} & set(sys.modules), "loaded"
assert before == (torch.compiler.disable, torch.compiler.allow_in_graph)
from transformers import utils
assert utils.is_torch_distributed_available() == torch.distributed.is_available()
assert "torch.distributed.tensor" not in sys.modules
with lean.quietly():
    other = sources.read_model("x", Path({str(folder)!r}))
from peft import LoraConfig, get_peft_model
tuned = get_peft_model(other, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
assert tuned(input_ids=torch.arange(4)[None]).logits.shape[1] == 4
model.save_pretrained({str(tmp_path / "again")!r})
from transformers import AutoModelForCausalLM
again = AutoModelForCausalLM.from_pretrained({str(tmp_path / "again")!r})
tokens = again.generate(input_ids=torch.arange(4)[None], max_new_tokens=3, do_sample=False)
assert torch.equal(tokens, model.generate(input_ids=torch.arange(4)[None], max_new_tokens=3, do_sample=False))
import torch._dynamo
assert torch._dynamo.__file__ and torch._dynamo.optimize
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2.0, 2.0]
"""
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_the_shared_list_of_models_is_the_one_transformers_makes():
    """Kills: one list used in two places that differ."""
    from pathlib import Path

    import transformers
    from transformers.utils import import_utils

    folder = Path(transformers.__file__).parent / "models"
    shared = import_utils.spread_import_structure(import_utils.create_import_structure_from_path(folder))
    assert import_utils.define_import_structure(str(folder / "__init__.py")) == shared
