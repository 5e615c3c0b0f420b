"""The book of a round: what clients sent, whole or not at all, and nobody asked twice."""

import hashlib

import pytest

from federating import plan, quiet
from kilotune.core.errors import FederationError, RunError
from kilotune.engine.alone import tune
from kilotune.engine.rounds import book as book_module
from kilotune.engine.rounds.book import Book, Entry, append_entry
from kilotune.engine.rounds.ledger import Ledger
from kilotune.engine.session import federate
from lying import prepared

FACTS = {"round": 2, "num_examples": 7, "loss": 1.25}


def written(folder, *clients: str, head: str = "aa", number: int = 3) -> Book:
    book = Book(folder)
    book.open(number, head)
    for client in clients:
        book.add(client, FACTS, client.encode() * 50 + b"\n{}")
    return book


@pytest.mark.parametrize("lost", [1, 100, 152, 200])
def test_a_cut_entry_is_dropped_and_the_next_follows_the_last_whole_one(tmp_path, lost):
    """Kills: half a payload that counts; an entry behind rubbish that nobody finds again."""
    written(tmp_path, "ada", "bob")
    path = tmp_path / "00003.bin"
    path.write_bytes(path.read_bytes()[:-lost])
    book = Book(tmp_path)
    assert book.open(3, "aa") == {"ada": FACTS}
    book.add("bob", FACTS, b"new")
    assert [(e.client, e.payload) for e in book.entries(3)] == [("ada", b"ada" * 50 + b"\n{}"), ("bob", b"new")]
    assert list(book.payloads(["bob", "ada"])) == [("bob", b"new"), ("ada", b"ada" * 50 + b"\n{}")]


def test_an_altered_payload_ends_the_book(tmp_path):
    """Kills: a length that fits in place of a checksum."""
    written(tmp_path, "ada", "bob")
    path = tmp_path / "00003.bin"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))
    assert [entry.client for entry in Book(tmp_path).entries(3)] == ["ada"]


def test_answers_to_another_history_do_not_count(tmp_path):
    """Kills: after a restored backup, updates computed on weights that nobody holds."""
    written(tmp_path, "ada", "bob")
    book = Book(tmp_path)
    assert book.open(3, "bb") == {}
    assert book.entries(3) == []


@pytest.mark.parametrize(
    ("keep", "size", "clients", "stays"),
    [
        ("auto", 90, 2, True),
        ("auto", 110, 2, False),
        ("auto", 90, 1, False),
        ("always", 110, 1, True),
        ("never", 90, 2, False),
    ],
)
def test_what_is_kept_after_the_round(tmp_path, monkeypatch, keep, size, clients, stays):
    """Kills: gigabytes kept unasked; a book thrown away that withdrawals need."""
    monkeypatch.setattr(book_module, "AUTO_BYTES", 200)
    append_entry(tmp_path / "00001.bin", Entry("ada", "aa", {}, b"x" * size))
    line = (tmp_path / "00001.bin").stat().st_size - size
    monkeypatch.setattr(book_module, "AUTO_BYTES", line + 100)
    book = Book(tmp_path, keep)
    book.settle(1, clients)
    assert (tmp_path / "00001.bin").exists() is stays
    if not stays:
        with pytest.raises(RunError, match="keep_contributions: always"):
            book.entries(1)


def test_a_run_keeps_the_payloads_its_ledger_names(base, data, tmp_path):
    """Kills: a book that is not what was summed."""
    federate(plan(base, data, "kilotune"), tmp_path, quiet)
    book = Book(tmp_path / "contributions")
    for record in Ledger.load(tmp_path).records:
        sent = {e.client: hashlib.sha256(e.payload).hexdigest() for e in book.entries(record.round)}
        assert sent == {c.client: c.payload_sha256 for c in record.contributions}
        assert all(entry.head == record.previous for entry in book.entries(record.round))


def test_one_machine_alone_keeps_no_book(base, data, tmp_path):
    tune(plan(base, data, "local_subspace"), tmp_path, quiet)
    assert not list((tmp_path / "contributions").glob("*"))


def test_without_defences_and_book_nothing_is_written(base, data, tmp_path):
    """Kills: a large run that pays for a book nobody wants."""
    settings = ("defences.enabled=false", "keep_contributions=never")
    alone = federate(plan(base, data, "kilotune", *settings), tmp_path / "a", quiet)
    assert not (tmp_path / "a" / "contributions").exists()
    assert federate(plan(base, data, "kilotune", settings[0]), tmp_path / "b", quiet)["digest"] == alone["digest"]


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.mark.parametrize("defences", ["true", "false"])
def test_a_killed_server_does_not_ask_again_who_had_answered(base, data, tmp_path, defences):
    """Kills: a round that starts anew; an answer that counts twice; one that is lost."""
    recipe = plan(base, data, "kilotune", f"defences.enabled={defences}")
    whole = prepared(recipe, tmp_path / "whole")
    whole.run()

    def dying(event):
        if event["event"] == "client" and event.get("round") == 2 and event["client"] == "bob":
            raise Killed

    with pytest.raises(Killed):
        prepared(recipe, tmp_path / "cut", emit=dying).run()
    again = prepared(recipe, tmp_path / "cut")
    again.run()
    assert again.exchange.asked == [(2, "cyd")]
    assert again.ledger.head == whole.ledger.head
    assert again.replica.digest() == whole.replica.digest()
    assert (again.tally.up_bytes, again.tally.client_rounds) == (whole.tally.up_bytes, whole.tally.client_rounds)


def test_answers_of_a_round_that_was_too_small_count_when_the_others_are_back(base, data, tmp_path):
    """Kills: a client that trains again because others were away."""
    recipe = plan(base, data, "kilotune", "rounds=1", "min_clients=3")

    def away(replica, request, reply):
        return type(reply)(error="away")

    with pytest.raises(FederationError, match="min_clients is 3"):
        prepared(recipe, tmp_path, {"bob": away}).run()
    again = prepared(recipe, tmp_path)
    again.run()
    assert again.exchange.asked == [(1, "bob")]
    assert [c.client for c in again.ledger.records[0].contributions] == ["ada", "bob", "cyd"]
