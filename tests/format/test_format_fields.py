"""What each format makes of a record."""

import pytest

from kilotune.format import Turn
from kilotune.format.alpaca import Alpaca
from kilotune.format.messages import Messages
from kilotune.format.prompt_completion import PromptCompletion
from kilotune.format.sharegpt import ShareGPT
from kilotune.format.text import Text


def test_alpaca_joins_instruction_and_input_with_a_blank_line():
    """Kills: input lost; a blank line where there is no input."""
    read = Alpaca().read
    assert read({"instruction": "add", "input": "1 2", "output": "3"}).turns == (
        Turn("user", "add\n\n1 2"),
        Turn("assistant", "3"),
    )
    for empty in ({"input": ""}, {"input": None}, {}):
        assert read({"instruction": "add", **empty, "output": "3"}).turns[0] == Turn("user", "add")


def test_alpaca_takes_response_only_where_output_is_absent():
    """Kills: Dolly rows refused; `response` preferred to `output`."""
    assert Alpaca().read({"instruction": "a", "response": "r"}).turns[1].content == "r"
    assert Alpaca().read({"instruction": "a", "output": "o", "response": "r"}).turns[1].content == "o"
    with pytest.raises(ValueError, match=r"field 'output' is missing; found 'instruction', 'input'."):
        Alpaca().read({"instruction": "a", "input": "b"})


def test_instructions_beside_a_list_of_turns_are_left_to_the_chat_formats():
    """Kills: a system text called `instruction` read as an Alpaca row without output."""
    record = {"instruction": "Be kind.", "conversations": [{"from": "human", "value": "a"}]}
    assert not Alpaca.matches(record) and ShareGPT.matches(record)
    record = {"prompt": "a", "messages": []}
    assert not PromptCompletion.matches(record) and Messages.matches(record)


def test_turns_after_the_last_answer_are_dropped():
    """Kills: samples that end with the user."""
    messages = [{"role": r, "content": r} for r in ("system", "user", "assistant", "user")]
    assert [t.role for t in Messages().read({"messages": messages}).turns] == ["system", "user", "assistant"]
    talk = [{"from": f, "value": f} for f in ("system", "human", "gpt", "human")]
    assert [t.role for t in ShareGPT().read({"conversations": talk}).turns] == ["system", "user", "assistant"]
    with pytest.raises(ValueError, match="no turn of role 'assistant'"):
        Messages().read({"messages": messages[:2]})
    with pytest.raises(ValueError, match="no turn from 'gpt'"):
        ShareGPT().read({"conversations": talk[:2]})


def test_a_bad_turn_is_named_by_its_number():
    """Kills: errors that leave a long conversation to be searched."""
    good = {"role": "user", "content": "a"}
    for bad, message in (
        ({"role": "tool", "content": "a"}, "turn 2: got role 'tool', expected system, user or assistant"),
        ({"role": "user"}, "turn 2: got {'role': 'user'}, expected an object with 'role' and 'content'"),
        ({"role": "user", "content": None}, "turn 2: got content of type NoneType, expected text"),
    ):
        with pytest.raises(ValueError, match=message):
            Messages().read({"messages": [good, bad]})
    with pytest.raises(ValueError, match="turn 1: got from 'narrator', expected human, gpt or system"):
        ShareGPT().read({"conversations": [{"from": "narrator", "value": "a"}]})


def test_plain_text_is_marked_as_such():
    """Kills: a chat template around a corpus; empty texts."""
    assert Text().read({"text": "sea"}).plain
    with pytest.raises(ValueError, match="field 'text': got an empty text"):
        Text().read({"text": " \n"})
