"""The embedded demo data: deterministic, held out, non-IID, answerable."""

import json

import pytest

from kilotune.core.errors import DataError
from kilotune.engine.rows import households
from kilotune.engine.rows.data import load_rows
from kilotune.engine.rows.households import generate, number_words, write_jsonl


@pytest.fixture(scope="module")
def rows():
    return generate()


def of(rows, client, split=None):
    return [row for row in rows if row["client"] == client and split in (None, row["split"])]


def test_there_are_six_homes_of_500_rows_with_an_eighth_held_out_each(rows):
    """Kills: too few rows; a home without held-out rows."""
    assert len(households.names()) == 6 and len(rows) == 3000
    for name in households.names():
        assert len(of(rows, name)) == 500
        assert 55 <= len(of(rows, name, "test")) <= 66
    assert {tuple(row) for row in rows} == {("client", "instruction", "input", "output", "task", "split")}


def test_rows_follow_from_the_seed_and_not_from_the_number_of_homes(rows):
    """Kills: global randomness; a third home that changes the first two."""
    assert generate() == rows
    assert generate(households=2) == rows[:1000]
    assert generate(seed=1, households=1) != rows[:500]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_request_stands_twice_so_none_is_both_learnt_and_held_out(seed):
    """Kills: held-out requests in any home's training rows; one request with two answers."""
    texts = [row["instruction"].lower() for row in generate(seed)]
    assert len(set(texts)) == len(texts)


def test_every_answer_is_compact_json_of_one_shared_schema(rows):
    """Kills: spaces in answers; an argument with two types; a tool with other arguments in another home."""
    schema: dict[str, set[str]] = {}
    types: dict[str, type] = {}
    for row in rows:
        answer = json.loads(row["output"])
        assert json.dumps(answer, separators=(",", ":")) == row["output"]
        assert answer["tool"] == row["task"] and row["input"] == ""
        required = {key for key in answer if key not in ("at", "after")}
        assert schema.setdefault(row["task"], required) == required
        for key, value in answer.items():
            assert types.setdefault(key, type(value)) is type(value)


def test_homes_share_tools_but_no_room_device_or_scene(rows):
    """Kills: IID homes; a home that has every tool; one name with two meanings."""
    tools = {name: {row["task"] for row in of(rows, name)} for name in households.names()}
    everything = set.union(*tools.values())
    assert all(len(own) < len(everything) for own in tools.values())
    assert all(sum(tool in own for own in tools.values()) >= 1 for tool in everything)
    assert sum(sum(tool in own for own in tools.values()) >= 2 for tool in everything) >= len(everything) - 1
    owner: dict[str, str] = {}
    for row in rows:
        answer = json.loads(row["output"])
        for key in ("room", "device", "name", "source", "door"):
            if key in answer:
                assert owner.setdefault(f"{key} {answer[key]}", row["client"]) == row["client"]


def test_all_names_and_habits_of_held_out_answers_stand_in_the_homes_training_rows(rows):
    """Kills: held-out rows that nobody could know (numbers and times are in the request or a habit)."""
    for name in households.names():
        known = {repr(value) for row in of(rows, name, "train") for value in json.loads(row["output"]).values()}
        for row in of(rows, name, "test"):
            answer = json.loads(row["output"])
            free = {key: value for key, value in answer.items() if key not in ("at", "after")}
            numbers = [key for key, value in free.items() if type(value) is int and repr(value) not in known]
            for key in free.keys() - set(numbers):
                assert repr(free[key]) in known, (name, key, row)
            for key in numbers:
                assert str(free[key]) in row["instruction"] or number_words(free[key]) in row["instruction"].lower()


def test_requests_and_answers_stay_short(rows):
    """Kills: wordings that make the demo slow. Bytes bound tokens from above."""
    assert max(len(row["instruction"]) for row in rows) <= 120
    assert max(len(row["output"]) for row in rows) <= 100


def test_homes_write_times_their_own_way_and_mean_the_same(rows):
    """Kills: a clock that reads twelve hours wrong."""
    clock = households._clock
    assert clock("spoken", 19, 30) == "at half past seven tonight"
    assert clock("spoken", 7, 45) == "at a quarter to eight in the morning"
    assert clock("spoken", 12, 0) == "at twelve in the afternoon"
    assert clock("pm", 19, 30) == "at 7:30pm" and clock("pm", 12, 0) == "at 12pm" and clock("pm", 5, 0) == "at 5am"
    assert clock("evening", 19, 5) == "at 7:05"
    assert clock("military", 5, 30) == "at 0530"
    assert clock("colon", 7, 0) == "at 7:00"
    assert clock("sign", 7, 0) == "@07:00"
    assert [number_words(n) for n in (7, 13, 20, 85)] == ["seven", "thirteen", "twenty", "eighty-five"]


def test_the_alias_loads_them_and_the_file_holds_the_same(rows, tmp_path):
    """Kills: an alias that differs from the file."""
    file = tmp_path / "homes.jsonl"
    assert write_jsonl(file) == 3000
    loaded, made = load_rows(str(file)), load_rows("households")
    assert [(r.record, r.client, r.split) for r in loaded] == [(r.record, r.client, r.split) for r in made]
    assert [r.record for r in made] == rows
    assert [r.record for r in load_rows("households:2")] == rows[:1000]


def test_impossible_numbers_are_refused(monkeypatch):
    """Kills: an endless search for new wordings."""
    with pytest.raises(DataError, match="households: got 7 households, expected 1 to 6"):
        load_rows("households:7")
    with pytest.raises(DataError, match="households:x: got 'x' households"):
        load_rows("households:x")
    content = households._homes()
    poor = content["homes"][0] | {"tools": [content["homes"][0]["tools"][-1]]}
    monkeypatch.setattr(households, "_homes", lambda: content | {"homes": [poor]})
    with pytest.raises(DataError, match="rows_per_household = 500, expected at most 56: mill_house"):
        generate(households=1, rows_per_household=500)
