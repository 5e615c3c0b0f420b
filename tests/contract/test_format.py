"""Laws of every format the registry finds."""

import json

import pytest

from kilotune.core.registry import find, names
from kilotune.format import Format, Sample

RECORDS = {
    "alpaca": {"instruction": "add", "input": "1 2", "output": "3"},
    "prompt_completion": {"prompt": "add 1 2", "completion": "3"},
    "messages": {"messages": [{"role": "user", "content": "add 1 2"}, {"role": "assistant", "content": "3"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "add 1 2"}, {"from": "gpt", "value": "3"}]},
    "text": {"text": "1 and 2 is 3"},
}


def by_priority():
    return sorted((find("format", name) for name in names("format")), key=lambda method: method.priority)


def test_every_format_has_a_sample_record_here():
    """Kills: a new format that these laws do not see."""
    assert set(names("format")) == set(RECORDS)


def test_no_two_formats_have_one_priority():
    """Kills: detection that depends on the order of files in a folder."""
    priorities = [method.priority for method in by_priority()]
    assert len(set(priorities)) == len(priorities)


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_is_recognised_as_its_own_format_first(name):
    """Kills: a greedy format that takes another's records; fields of metadata that confuse."""
    for extra in ({}, {"client": "a", "split": "train", "task": "t", "id": 3, "tags": ["x"]}):
        record = RECORDS[name] | extra
        assert next(m for m in by_priority() if m.matches(record)).method_name() == name


@pytest.mark.parametrize("name", RECORDS)
def test_samples_end_with_the_assistant_and_reading_alters_nothing(name):
    """Kills: turns without an answer; a record changed in place; answers that depend on earlier calls."""
    method: Format = find("format", name)()
    before = json.dumps(RECORDS[name])
    first, second = method.read(RECORDS[name]), method.read(RECORDS[name])
    assert isinstance(first, Sample) and first == second
    assert first.turns[-1].role == "assistant"
    assert all(turn.role in ("system", "user", "assistant") for turn in first.turns)
    assert json.dumps(RECORDS[name]) == before


@pytest.mark.parametrize("name", RECORDS)
def test_a_missing_or_wrong_field_is_named(name):
    """Kills: KeyError and TypeError from a bad record; messages that name no field."""
    method: Format = find("format", name)()
    for field in RECORDS[name]:
        if field == "input":
            continue
        for bad in (None, 3, [], {"a": 1}, [1]):
            with pytest.raises(ValueError, match=f"field '{field}'"):
                method.read(RECORDS[name] | {field: bad})
        without = {key: value for key, value in RECORDS[name].items() if key != field}
        with pytest.raises(ValueError, match=f"field '{field}'"):
            method.read(without)
