"""Encoding: where loss falls, what truncation keeps, which template is used."""

import numpy as np
import pytest
from tiny_tokenizer import CHATML, tiny_tokenizer
from tokenizers import pre_tokenizers

from kilotune.core.errors import DataError, RecipeError
from kilotune.core.rng import stream
from kilotune.engine.composing.recipe import DataSection
from kilotune.engine.rows import tokenize
from kilotune.engine.rows.data import Row, read_sample
from kilotune.engine.rows.templates import Template
from kilotune.engine.rows.tokenize import IGNORE, encode, encode_prompt, show, stop_ids
from kilotune.format import Turn

CHAT = {
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "the one"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "the other"},
    ]
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def row(record, line=1):
    return Row(record, "data/train.jsonl", line)


def alpaca(instruction="turn it on", output="done", extra=""):
    return row({"instruction": instruction, "input": extra, "output": output})


def learnt(example, tokenizer):
    """The text of every labelled stretch."""
    parts = [s.text for s in tokenize._segments(example, tokenizer) if s.loss]
    assert all(label in (IGNORE, token) for label, token in zip(example.labels, example.input_ids, strict=True))
    return parts


def one(record, tokenizer, **settings):
    examples, report = encode([record], tokenizer, DataSection(**settings))
    return examples[0], report


def test_loss_falls_on_the_answer_and_its_end_of_turn_mark_and_nowhere_else(tokenizer):
    """Kills: EOS left out; the line break after the mark learnt; header learnt."""
    example, report = one(alpaca(), tokenizer)
    assert learnt(example, tokenizer) == ["done<|im_end|>"]
    assert tokenizer.decode(example.input_ids).endswith("<|im_start|>assistant\ndone<|im_end|>")
    assert report.label_tokens == len("done") + 1
    assert example.reference == "done"


def test_every_answer_of_a_conversation_carries_loss(tokenizer):
    """Kills: only the last answer learnt; user turns learnt."""
    example, _ = one(row(CHAT), tokenizer)
    assert learnt(example, tokenizer) == ["the one<|im_end|>", "the other<|im_end|>"]
    assert tokenizer.decode(example.prompt_ids).endswith("and?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("template", ["chat", "plain", "alpaca"])
@pytest.mark.parametrize("answer", ["done", "zoo", "\nzoo", " x ", "a < b", "é\u4f60", "two\n\n"])
def test_prompt_tokens_are_those_from_which_an_answer_is_generated(tokenizer, template, answer):
    """Kills: tokens that span prompt and answer ("\\n" + "z" is one token here); prompts tokenised otherwise later."""
    settings = DataSection(template=template)
    record = alpaca("go\n", answer)
    example = encode([record], tokenizer, settings)[0][0]
    prompt = encode_prompt(read_sample(record).turns[:-1], tokenizer, settings)
    assert example.prompt_ids.tolist() == prompt.tolist()
    assert learnt(example, tokenizer) == [f"{answer}<|im_end|>"]


def test_tokenizers_with_a_leading_space_fall_back_to_comparing_whole_texts():
    """Kills: a space in the middle of every row; labels that begin before the token that holds the answer."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    assert not tokenize._separable(tokenizer)
    record = alpaca("go", "zoo")
    example, _ = one(record, tokenizer, template="plain")
    whole = tokenizer("go\nzoo<|im_end|>", add_special_tokens=False)["input_ids"]
    assert example.input_ids.tolist() == whole
    assert learnt(example, tokenizer) == ["\nzoo<|im_end|>"]  # "\nz" is one token: it must be learnt


def test_joined_and_compared_tokens_agree_where_nothing_merges_over_a_border(tokenizer):
    """Kills: a wrong edge in one of the two ways."""
    rows = [alpaca(f"say {n}", f"word {n}") for n in range(20)] + [row(CHAT)]
    template = Template(tokenizer, DataSection())
    layouts = [template.lay_out(read_sample(r), r.record) for r in rows]
    assert tokenize._joined(layouts, tokenizer, rows) == tokenize._compared(layouts, tokenizer, rows)


def test_the_quick_layout_equals_the_incremental_one(tokenizer):
    """Kills: a shortcut that differs from what the template writes."""
    quick, slow = (Template(tokenizer, DataSection(system="s")) for _ in range(2))
    assert quick.mark == "<|im_end|>"
    slow.mark = None
    for answer in ("done", "", "two words", "tag </think> x", " space "):
        sample = read_sample(alpaca(output=answer))
        assert quick.lay_out(sample) == slow.lay_out(sample)


@pytest.mark.parametrize(
    ("system", "begins"),
    [
        (None, "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user"),
        ("", "<|im_start|>system\n<|im_end|>\n<|im_start|>user"),
        ("Be kind.", "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user"),
    ],
)
def test_system_text_is_the_templates_own_none_or_the_given_one(tokenizer, system, begins):
    """Kills: "" treated as unset; a second system turn."""
    example, _ = one(alpaca(), tokenizer, system=system)
    assert tokenizer.decode(example.input_ids).startswith(begins)


def test_a_rows_own_system_turn_wins(tokenizer):
    """Kills: two system turns."""
    record = row({"messages": [{"role": "system", "content": "mine"}, *CHAT["messages"]]})
    text = tokenizer.decode(one(record, tokenizer, system="yours")[0].input_ids)
    assert "system\nmine" in text and "yours" not in text


def test_a_template_without_system_turns_refuses_a_system_text():
    """Kills: a template's exception as a traceback; "" refused."""
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    tokenizer = tiny_tokenizer(strict)
    with pytest.raises(RecipeError, match=r"data.system: got 'x'.*takes no system turn"):
        one(alpaca(), tokenizer, system="x")
    assert learnt(one(alpaca(), tokenizer, system="")[0], tokenizer) == ["done<|im_end|>"]
    record = row({"messages": [{"role": "system", "content": "mine"}, *CHAT["messages"]]}, 7)
    with pytest.raises(DataError, match=r"data/train.jsonl:7: the model's chat template refuses .*no system role"):
        one(record, tokenizer)


def test_templates_that_rewrite_history_still_mark_the_answers_words():
    """Kills: spans taken from a prefix that the full text does not have."""
    # The header of an answer differs between history and prompt, as in templates that drop reasoning from history.
    odd = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ('!' if loop.last else '?') + m['content']|trim + "
        "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
    )
    tokenizer = tiny_tokenizer(odd)
    assert learnt(one(row(CHAT), tokenizer)[0], tokenizer) == ["the one<|im_end|>", "the other<|im_end|>"]


def test_a_template_that_ends_no_turn_gets_an_end_mark():
    """Kills: models that never learn to stop."""
    bare = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    tokenizer = tiny_tokenizer(bare)
    assert learnt(one(alpaca(), tokenizer)[0], tokenizer) == ["done<|im_end|>"]


def test_plain_and_alpaca_layouts_are_as_documented(tokenizer):
    """Kills: input lost; wrong headers."""
    record = alpaca("Add.", "3", "1 2")
    text = tokenizer.decode(one(record, tokenizer, template="plain")[0].input_ids)
    assert text == "Add.\n\n1 2\n3<|im_end|>"
    text = tokenizer.decode(one(record, tokenizer, template="alpaca")[0].input_ids)
    assert text.startswith("Below is an instruction that describes a task, paired with an input")
    assert text.endswith("\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3<|im_end|>")
    text = tokenizer.decode(one(alpaca("Add."), tokenizer, template="alpaca")[0].input_ids)
    assert text.startswith("Below is an instruction that describes a task. Write") and "### Input" not in text


def test_a_tokenizer_without_a_chat_template_gets_the_plain_one():
    """Kills: a crash on base models."""
    tokenizer = tiny_tokenizer(None)
    example, report = one(alpaca(), tokenizer)
    assert report.template == "plain"
    assert tokenizer.decode(example.input_ids) == "turn it on\ndone<|im_end|>"


def test_plain_text_is_learnt_whole_but_for_its_first_token(tokenizer):
    """Kills: a template around plain text; a label nothing predicts."""
    example, report = one(row({"text": "the sea"}), tokenizer)
    assert tokenizer.decode(example.input_ids) == "the sea<|im_end|>"
    assert example.labels[0] == IGNORE and (example.labels[1:] == example.input_ids[1:]).all()
    assert report.label_tokens == len(example.input_ids) - 1
    assert example.prompt_ids.size == 0 and example.reference == "the sea"


def test_loss_on_everything_when_asked(tokenizer):
    """Kills: answer_only ignored."""
    example, report = one(alpaca(), tokenizer, answer_only=False)
    assert (example.labels[1:] == example.input_ids[1:]).all()
    assert report.label_tokens == report.tokens - 1
    assert tokenizer.decode(example.prompt_ids).endswith("assistant\n")


def random_rows(count, rng):
    letters = list("abc the\n")
    words = lambda: "".join(rng.choice(letters, size=int(rng.integers(1, 60))))  # noqa: E731
    for number in range(count):
        match number % 3:
            case 0:
                yield alpaca(words(), words(), words())
            case 1:
                yield row({"text": "ab" + words()})
            case _:
                roles = ["user", "assistant"] * int(rng.integers(1, 4))
                yield row({"messages": [{"role": r, "content": words()} for r in roles]})


@pytest.mark.parametrize("template", ["chat", "plain", "alpaca"])
@pytest.mark.parametrize("max_length", [8, 9, 13, 32, 64, 150])
def test_no_row_is_ever_cut_to_nothing(tokenizer, template, max_length):
    """Kills: an answer cut away; a limit overrun; counts that do not add up; an answer that lost its beginning."""
    rows = list(random_rows(45, stream(0, "rows", max_length)))
    whole, _ = encode(rows, tokenizer, DataSection(template=template, max_length=100_000))
    examples, report = encode(rows, tokenizer, DataSection(template=template, max_length=max_length))
    cut = [len(a.input_ids) < len(b.input_ids) for a, b in zip(examples, whole, strict=True)]
    assert report.num_rows == len(rows) and report.num_truncated == sum(cut)
    assert report.label_tokens == sum(example.num_labels for example in examples)
    for example, full, shorter in zip(examples, whole, cut, strict=True):
        assert example.num_labels >= 1 and len(example.input_ids) == min(max_length, len(full.input_ids))
        begin = full.input_ids[full.prompt_length :][: len(example.input_ids) - example.prompt_length]
        assert example.input_ids[example.prompt_length :].tolist() == begin.tolist()
        if full.prompt_length and shorter:
            assert example.prompt_length >= min(full.prompt_length, max_length // 4)
            assert example.prompt_ids[-1] == full.prompt_ids[-1]  # the answer's header stays


def test_truncation_is_counted_by_what_was_cut(tokenizer):
    """Kills: prompt and answer cuts mixed up."""
    long, short = "a" * 90, "b"
    _, prompt_cut = one(alpaca(long, short), tokenizer, template="plain", max_length=40)
    _, answer_cut = one(alpaca(short, long), tokenizer, template="plain", max_length=40)
    _, both = one(alpaca(long, long), tokenizer, template="plain", max_length=40)
    _, none = one(alpaca(short, short), tokenizer, template="plain", max_length=40)
    counts = [(r.num_truncated, r.num_prompt_cut, r.num_answer_cut) for r in (prompt_cut, answer_cut, both, none)]
    assert counts == [(1, 1, 0), (1, 0, 1), (1, 1, 1), (0, 0, 0)]


def test_the_first_token_after_a_cut_carries_no_loss(tokenizer):
    """Kills: learning to jump over the gap."""
    talk = [{"role": r, "content": r[0] * n} for r, n in zip(("user", "assistant") * 2, (20, 40, 5, 5), strict=True)]
    example, report = one(row({"messages": talk}), tokenizer, template="plain", max_length=40)
    seam = example.prompt_length // 2
    assert report.num_prompt_cut == 1 and tokenizer.decode(example.input_ids[seam : seam + 2]) == "aa"
    assert example.labels[seam] == IGNORE and example.labels[seam + 1] != IGNORE


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"instruction": "a", "input": "b"},
            "data/train.jsonl:17: field 'output' is missing; found 'instruction', 'input'.",
        ),
        ({"question": "a"}, "data/train.jsonl:17: found 'question'; expected the fields of a known layout: alpaca, "),
        ({"instruction": "a", "output": "\ud800"}, "data/train.jsonl:17: the text holds half of a surrogate pair"),
        (
            {"messages": [{"role": "assistant", "content": "a"}]},
            "data/train.jsonl:17: the conversation opens with its only answer",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tokenizer, record, message):
    """Kills: errors without a place."""
    with pytest.raises(DataError) as error:
        encode([alpaca(), row(record, 17)], tokenizer, DataSection())
    assert str(error.value).startswith(message)


def test_a_row_without_anything_to_learn_is_refused():
    """Kills: rows with no label (a NaN loss later)."""
    tokenizer = tiny_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"data/train.jsonl:1: nothing to learn"):
        one(alpaca(output=""), tokenizer)


def test_examples_do_not_depend_on_the_chunks(tokenizer, monkeypatch):
    """Kills: an index that counts from the chunk; progress that does not reach the end."""
    rows = [alpaca(f"say {n}", f"{n}") for n in range(7)]
    whole, _ = encode(rows, tokenizer, DataSection())
    monkeypatch.setattr(tokenize, "CHUNK", 3)
    seen = []
    parts, _ = encode(rows, tokenizer, DataSection(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 7), (6, 7), (7, 7)]
    assert [e.row for e in parts] == list(range(7))
    for a, b in zip(whole, parts, strict=True):
        assert np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.labels, b.labels)


def test_stop_tokens_are_the_end_of_turn_mark_and_eos():
    """Kills: endless generation where EOS is not what ends a turn."""
    tokenizer = tiny_tokenizer()
    mark, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>"))
    assert stop_ids(tokenizer, DataSection()) == [mark]
    tokenizer.eos_token = "<|endoftext|>"
    assert stop_ids(tokenizer, DataSection()) == sorted([mark, end])
    assert stop_ids(tokenizer, DataSection(template="plain")) == [end]


def test_shown_rows_mark_what_carries_loss(tokenizer):
    """Kills: markup in the data read as style; text lost in one of the three forms."""
    shown = show([alpaca("[red]on", "ok"), alpaca(), alpaca()], tokenizer, DataSection(template="plain"), limit=2)
    assert len(shown) == 2
    assert shown[0].marked() == "[red]on\n«ok<|im_end|>»"
    assert shown[0].styled().plain == "[red]on\nok<|im_end|>"
    assert shown[0].as_dict()["segments"] == [
        {"text": "[red]on\n", "loss": False},
        {"text": "ok<|im_end|>", "loss": True},
    ]


def test_prompts_for_chat_follow_the_template_and_keep_the_history(tokenizer):
    """Kills: a missing generation prompt."""
    turns = [Turn("user", "hi"), Turn("assistant", "yes"), Turn("user", "on")]
    text = tokenizer.decode(encode_prompt(turns, tokenizer, DataSection(system="")))
    assert text.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\nhi<|im_end|>")
    assert text.endswith("<|im_start|>user\non<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(encode_prompt(turns, tokenizer, DataSection(template="plain"))) == "hi\nyes<|im_end|>\non\n"
