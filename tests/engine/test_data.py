"""Files to rows, rows to clients, rows to batches."""

import gzip
import json
import sys
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kilotune.core.errors import DataError, RecipeError
from kilotune.engine.rows.batches import BatchSampler
from kilotune.engine.rows.data import (
    Row,
    data_digest,
    default_partition,
    load_rows,
    partition,
    partition_counts,
    read_sample,
    select,
)
from kilotune.partition.field import ByField
from kilotune.partition.iid import IID

FIXED = settings(max_examples=60, deadline=None, derandomize=True, database=None)

RECORDS = [
    {"client": "b", "instruction": "é?", "input": "", "output": "1"},
    {"client": "a", "instruction": "two,\nlines", "input": "x", "output": "2", "split": "test"},
    {"client": "b", "instruction": "q", "input": "", "output": "3"},
]


def write(path, text):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return str(path)


def lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def as_csv(records):
    quote = lambda cell: '"' + cell.replace('"', '""') + '"'  # noqa: E731
    keys = ["client", "instruction", "input", "output", "split"]
    return "\r\n".join([",".join(keys)] + [",".join(quote(r.get(k, "")) for k in keys) for r in records])


CONTENT = {
    "d.jsonl": lines(RECORDS),
    "d.ndjson": "\ufeff" + lines(RECORDS).replace("\n", "\r\n\r\n"),
    "d.jsonl.gz": lines(RECORDS),
    "d.json": json.dumps(RECORDS, indent=2),
    "d.json.gz": lines(RECORDS),
    "d.csv": as_csv(RECORDS),
    "d.csv.gz": as_csv(RECORDS),
}


@pytest.mark.parametrize("name", CONTENT)
def test_every_file_type_gives_the_same_rows(tmp_path, name):
    """Kills: a BOM in the first field, lost line breaks in cells, wrong encodings, a split that is not read."""
    rows = load_rows(write(tmp_path / name, CONTENT[name]))
    read = [{k: v for k, v in row.record.items() if (k, v) != ("split", "")} for row in rows]
    assert read == RECORDS
    assert [(row.client, row.split) for row in rows] == [("b", "train"), ("a", "test"), ("b", "train")]


def test_parquet_gives_the_same_rows_with_row_numbers(tmp_path):
    """Kills: nulls taken for values; numbering by batch."""
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"split": None, **r} for r in RECORDS]), path)
    rows = load_rows(str(path))
    assert [(row.line, row.client, row.split) for row in rows] == [
        (1, "b", "train"),
        (2, "a", "test"),
        (3, "b", "train"),
    ]
    assert [{k: v for k, v in row.record.items() if v is not None} for row in rows] == RECORDS


def test_rows_know_their_line(tmp_path):
    """Kills: counting records instead of lines where there are empty lines or indented objects."""
    path = write(tmp_path / "d.jsonl", '{"text": "a"}\n\n{"text": "b"}\n')
    assert [row.where for row in load_rows(path)] == [f"{path}:1", f"{path}:3"]
    path = write(tmp_path / "d.json", '[\n  {\n    "text": "a"\n  },\n  {"text": "b"}, {"text": "c"}\n]\n')
    assert [row.line for row in load_rows(path)] == [2, 5, 5]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"text": "a"}\n{"text": \n', ":2: not valid JSON: "),
        ("d.jsonl", '{"text": "a"}\n[1]\n', ":2: got a JSON list, expected an object"),
        ("d.json", '[{"text": "a"},\n{"text" 1}]', ":2: not valid JSON: "),
        ("d.json", '[{"text": "a"},\n', ":2: not valid JSON: "),
        ("d.json", "[3]", ":1: got a JSON int, expected an object"),
        ("d.json", '[{"text": "a"}]\nx', ":1: not valid JSON: 'x' after the end of the array"),
        ("d.csv", "text,client\na,b\nc,d,e\n", ":2: got 3 cells, expected 2 as in the header"),
        ("d.csv", "text,client\na\n", ":1: got 1 cells, expected 2 as in the header"),
        ("d.jsonl", "", ": got an empty file, expected at least one record."),
        ("d.json", "[]", ": got an empty file, expected at least one record."),
        ("d.jsonl", '{"text": "a", "split": "tset"}', ":1: field 'split': got 'tset', expected train, valid or test."),
        ("d.jsonl", '{"text": "a", "client": [1]}', ":1: field 'client': got list, expected a name."),
        ("d.doc", "x", ": got a file ending in '.doc', expected one of .jsonl, "),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, message):
    """Kills: tracebacks; errors without file and line."""
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        load_rows(path)
    assert str(error.value).startswith(path + message)


def test_broken_bytes_are_named(tmp_path):
    """Kills: tracebacks from gzip, Parquet and UTF-8."""
    whole = gzip.compress(lines(RECORDS * 500).encode())
    for name, content, message in (
        ("d.jsonl.gz", whole[: len(whole) // 2], "not a whole gzip file"),
        ("e.jsonl.gz", b"plain", "not a whole gzip file"),
        ("d.jsonl", '{"text": "é"}'.encode("latin-1"), "not UTF-8 text"),
        ("d.parquet", b"PAR1 and no more", "not a whole Parquet file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_rows(str(tmp_path / name))


def test_a_missing_file_names_the_nearest_one(tmp_path):
    """Kills: a bare 'not found'; a misspelt file taken for a hub id."""
    write(tmp_path / "train.jsonl", lines(RECORDS))
    with pytest.raises(DataError, match=r"trian.jsonl: no such file or folder, .*Did you mean 'train.jsonl'\?"):
        load_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match="there is no folder"):
        load_rows(str(tmp_path / "nowhere" / "train.jsonl"))


def test_a_folders_file_names_give_the_split_unless_the_row_does(tmp_path):
    """Kills: the file's name winning over the row; other files read as data."""
    for name in ("train-00000-of-00001", "validation", "test", "notes"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"text": name}) + "\n")
    write(tmp_path / "train-00000-of-00001.jsonl", '{"text": "t"}\n{"text": "u", "split": "dev"}\n')
    rows = load_rows(str(tmp_path))
    assert [(row.record["text"], row.split) for row in rows] == [
        ("t", "train"),
        ("u", "valid"),
        ("validation", "valid"),
        ("test", "test"),
    ]
    assert [row.record["text"] for row in load_rows(str(tmp_path), "validation")] == ["u", "validation"]


def test_a_folder_without_named_files_says_what_it_found(tmp_path):
    """Kills: guessing."""
    write(tmp_path / "a.jsonl", lines(RECORDS))
    with pytest.raises(DataError, match=r"found a.jsonl, expected files named train, valid or test"):
        load_rows(str(tmp_path))


def test_a_split_without_rows_says_which_splits_there_are():
    """Kills: an empty evaluation."""
    rows = [Row(r, "d", 1) for r in RECORDS]
    with pytest.raises(DataError, match="got no row of split 'test', found 3 train"):
        select(rows, "test")


def test_hub_ids_go_through_datasets_and_only_when_no_file_is_there(tmp_path, monkeypatch):
    """Kills: a network call for a local path; the hub's splits lost."""
    asked = []

    def load_dataset(name, config):
        asked.append((name, config))
        if name == "org/away":
            raise ConnectionError("Couldn't reach 'org/away' on the Hub (offline)")
        return {"train": [{"text": "a"}], "validation": [{"text": "b"}]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.chdir(tmp_path)
    rows = load_rows("org/name")
    assert [(row.where, row.split) for row in rows] == [
        ("org/name/train:1", "train"),
        ("org/name/validation:1", "valid"),
    ]
    load_rows("hub:org/name:main")
    assert asked == [("org/name", None), ("org/name", "main")]
    with pytest.raises(DataError, match=r"org/away: no such file here, and the hub did not .*Couldn't reach"):
        load_rows("org/away")
    (tmp_path / "org").mkdir()
    for local in ("org/name", "data/train.jsonl"):
        with pytest.raises(DataError, match="no such file or folder"):
            load_rows(local)
    assert len(asked) == 3


def test_progress_is_told(tmp_path):
    """Kills: a callback that is never called."""
    path = write(tmp_path / "d.jsonl", '{"text": "a"}\n' * 2500)
    seen = []
    load_rows(path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1000, 0), (2000, 0)]


def test_formats_may_be_mixed_or_forced():
    """Kills: one format per file; a forced format ignored; its name unchecked."""
    chat = Row({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "d", 1)
    assert [read_sample(row).turns[-1].content for row in (chat, Row(RECORDS[0], "d", 2))] == ["a", "1"]
    with pytest.raises(DataError, match="d:1: field 'instruction' is missing; found 'messages'"):
        read_sample(chat, "alpaca")
    with pytest.raises(RecipeError, match=r"data.format: got 'alpacca'.*Did you mean 'alpaca'\?"):
        read_sample(chat, "alpacca")


def rows_of(*clients, split="train"):
    return [Row({"task": f"t{i % 2}"}, "d.jsonl", i + 1, c, split) for i, c in enumerate(clients)]


def test_only_training_rows_are_partitioned_and_test_rows_stay_with_their_client():
    """Kills: held-out rows in a client's training set; indices into the filtered list."""
    rows = rows_of("b", split="test") + rows_of("a", "b", "a") + rows_of("a", None, split="test")
    assert partition(rows) == {"a": [1, 3], "b": [2]}


def test_without_clients_the_default_is_iid_over_four():
    """Kills: one client named None."""
    rows = rows_of(*[None] * 10)
    assert default_partition(rows) == IID(num_clients=4)
    parts = partition(rows, seed=1)
    assert list(parts) == ["client0", "client1", "client2", "client3"]
    assert sorted(i for part in parts.values() for i in part) == list(range(10))
    assert parts == partition(rows, seed=1) != partition(rows, seed=2)


def test_a_row_without_the_partitions_field_is_named():
    """Kills: KeyError; rows that go to a client called None."""
    with pytest.raises(DataError, match=r"d.jsonl:2: field 'client' is missing; found 'task'. The partition reads it."):
        partition(rows_of("a", None))
    with pytest.raises(DataError, match=r"d.jsonl:1: field 'topic' is missing"):
        partition(rows_of("a"), ByField(key="topic"))


def test_counts_are_reported_per_client_and_label():
    """Kills: counts of test rows; labels of another field."""
    rows = rows_of("a", "a", "b", "a")
    parts = partition(rows)
    assert partition_counts(rows, parts) == {"a": {"rows": 3}, "b": {"rows": 1}}
    assert partition_counts(rows, parts, "task")["a"] == {"rows": 3, "labels": {"t1": 2, "t0": 1}}


def test_the_digest_sees_content_order_and_split_but_not_file_names():
    """Kills: a digest of the path or of the keys' order; a digest that misses a change."""
    rows = [Row(r, "d", i, r["client"]) for i, r in enumerate(RECORDS, 1)]
    moved = [Row(dict(reversed(r.items())), "e", i + 5, r["client"]) for i, r in enumerate(RECORDS, 1)]
    assert data_digest(rows) == data_digest(moved)
    other = [rows[:2], rows[::-1], [Row(RECORDS[0], "d", 1, "c"), *rows[1:]], [*rows[:2], Row({}, "d", 3, "b")]]
    other.append([*rows[:2], Row(RECORDS[2], "d", 3, "b", "test")])
    assert len({data_digest(r) for r in [rows, *other]}) == 6


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5))
@FIXED
def test_every_example_comes_once_per_epoch_and_batches_are_full(num_examples, batch_size, seed):
    """Kills: a ragged last batch; examples lost or repeated where epochs meet."""
    sampler = BatchSampler(num_examples, batch_size, seed)
    size = min(batch_size, num_examples)
    sequence = [i for step in range(2 * num_examples) for i in sampler.indices(step)]
    assert len(sequence) == 2 * num_examples * size
    for epoch in range(2 * size):
        assert sorted(sequence[epoch * num_examples : (epoch + 1) * num_examples]) == list(range(num_examples))


def test_any_step_can_be_asked_first():
    """Kills: an iterator's state; a resumed run with other batches."""
    forward = [BatchSampler(10, 4, 7).indices(step) for step in range(20)]
    assert [BatchSampler(10, 4, 7).indices(step) for step in reversed(range(20))][::-1] == forward
    assert forward != [BatchSampler(10, 4, 8).indices(step) for step in range(20)]
    epochs = np.concatenate(forward).reshape(-1, 10)
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs)  # 8 permutations of 10: all differ
