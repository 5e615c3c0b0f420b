"""The file tokenizer is the tokenizer of transformers, as far as kilotune asks."""

import json

import pytest
from transformers import AutoTokenizer

from engine.tiny_tokenizer import tiny_tokenizer
from kilotune.engine.composing.recipe import DataSection
from kilotune.engine.model.sources import find_folder
from kilotune.engine.rows.data import load_rows
from kilotune.engine.rows.filetokenizer import open_tokenizer
from kilotune.engine.rows.tokenize import encode

TEXTS = ["", "the room 21", "\nzebra  ", "häßlich 漢字 🙂", "<|im_start|>user\nhi<|im_end|>", "a <|nothing|> b"]
TURNS = [{"role": "user", "content": "Hi <|im_end|> {{ x }}"}, {"role": "assistant", "content": "thé {% y %}"}]


def same(folder, rows):
    ours, theirs = open_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))
    for special in (True, False):
        expected = theirs(TEXTS, add_special_tokens=special)["input_ids"]
        assert ours(TEXTS, add_special_tokens=special)["input_ids"] == expected
        assert [ours(text, add_special_tokens=special)["input_ids"] for text in TEXTS] == expected
        for ids in expected:
            assert ours.decode(ids, skip_special_tokens=special) == theirs.decode(
                ids, skip_special_tokens=special, clean_up_tokenization_spaces=False
            )
    for name in ("bos_token", "eos_token", "unk_token"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.chat_template == theirs.chat_template
    if ours.chat_template:
        for prompt in (True, False):
            options = {"tokenize": False, "add_generation_prompt": prompt}
            assert ours.apply_chat_template(TURNS, **options) == theirs.apply_chat_template(TURNS, **options)
    settings = DataSection()
    mine, report = encode(rows, ours, settings)
    other, expected_report = encode(rows, theirs, settings)
    assert report == expected_report
    for a, b in zip(mine, other, strict=True):
        assert a.input_ids.tolist() == b.input_ids.tolist() and a.labels.tolist() == b.labels.tolist()


@pytest.mark.parametrize("template", ["own", "none", "generation"])
def test_it_equals_the_tokenizer_of_transformers(template, tmp_path):
    """Kills: special tokens read as text, another template environment, a pad token that is not there."""
    marked = (
        "{%- for m in messages %}\n{{ m['role'] }}: {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% else %}{{ m['content'] | tojson }}{% endif %}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = tiny_tokenizer() if template == "own" else tiny_tokenizer(marked if template == "generation" else None)
    tokenizer.save_pretrained(str(tmp_path))
    same(tmp_path, load_rows("households:1")[:40])


def test_a_template_may_not_reach_into_python(tmp_path):
    """Kills: a template of a downloaded model that runs code."""
    from jinja2.exceptions import SecurityError

    tiny_tokenizer("{{ messages.__class__.__mro__ }}").save_pretrained(str(tmp_path))
    with pytest.raises(SecurityError):
        open_tokenizer(tmp_path).apply_chat_template(TURNS)


def test_tokenizers_that_are_more_than_their_file_are_left_to_transformers(tmp_path):
    """Kills: a tokenizer class of its own taken for its file."""
    tiny_tokenizer().save_pretrained(str(tmp_path))
    assert open_tokenizer(tmp_path) is not None
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "tokenizer_class": "LlamaTokenizer"}))
    assert open_tokenizer(tmp_path) is None
    file.write_text(json.dumps(settings))
    (tmp_path / "tokenizer.json").unlink()
    assert open_tokenizer(tmp_path) is None


@pytest.mark.real
def test_it_equals_the_embedded_models_tokenizer():
    """Kills: digits that are not split, a lost chat template."""
    same(find_folder("smollm2-135m", None, None, None), load_rows("households:1")[:200])
