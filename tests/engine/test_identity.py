"""What clients remember of a run: a server that takes rounds back or shows two histories has signed the proof."""

import ast
import dataclasses
import json
import os
from pathlib import Path

import pytest

import kilotune
from kilotune.core.errors import FederationError, RunError, WireError
from kilotune.engine.flower.messages import Request
from kilotune.engine.operations.doctor import examine
from kilotune.engine.rounds.identity import HEADS, HistoryError, compare_heads, open_identity, read_heads
from sealing import ask, federation, follow, history


def test_two_clients_that_were_shown_one_history_agree(tmp_path):
    """Kills: a comparison of rounds that only one of them took part in; one that needs equal rounds."""
    ends = federation(tmp_path, "anna", "bert")
    ledger = history(b"one", b"two", b"three")
    follow(ends, "anna", history(b"one"))
    follow(ends, "anna", history(b"one", b"two"))
    follow(ends, "bert", ledger)
    found = compare_heads(tmp_path / "anna", tmp_path / "bert")
    assert (found.agree, found.rounds, found.conflict, found.proof) == (True, 2, None, None)
    assert found.clients == ("anna", "bert")
    told = examine(None, None, None, tmp_path, (tmp_path / "anna", tmp_path / "bert"))
    assert told["checks"][-1] == {
        "check": "histories",
        "ok": True,
        "found": "anna and bert were shown the same 2 rounds",
        "fix": "",
    }


def test_a_server_that_shows_two_histories_is_found_out_with_both_signatures(tmp_path):
    """Kills: looking at the last head alone; a verdict that rests on what a client says instead of on signatures."""
    ends = federation(tmp_path, "anna", "bert")
    follow(ends, "anna", history(b"one", b"two"))
    follow(ends, "anna", history(b"one", b"two", b"three", b"four"))
    follow(ends, "bert", history(b"one", b"TWO", b"three"))
    found = compare_heads(tmp_path / "anna", tmp_path / "bert" / HEADS)
    assert (found.agree, found.rounds, found.conflict) == (False, 1, 2)
    ours, theirs = found.proof
    told = examine(None, None, None, tmp_path, (tmp_path / "anna", tmp_path / "bert"))
    assert not told["ok"]
    assert told["checks"][-1]["found"].startswith("anna and bert were shown different rounds 2, both signed")
    assert (ours.statement.recipient, ours.statement.rounds) == ("anna", 2)
    assert (theirs.statement.recipient, theirs.statement.rounds) == ("bert", 3)
    assert ours.statement.head == history(b"one", b"two").head
    assert theirs.statement.head == history(b"one", b"TWO", b"three").head


def test_a_client_cannot_make_the_evidence_itself(tmp_path):
    """Kills: files that are believed as they are."""
    ends = federation(tmp_path, "anna", "bert")
    follow(ends, "anna", history(b"one", b"two"))
    path = tmp_path / "anna" / HEADS
    lines = path.read_text().splitlines()
    assert len(lines) == 4  # what it is, two rounds, a signature
    other = history(b"one", b"TWO")
    forged = json.loads(lines[2]) | {"payload": other.records[1].payload_sha256, "head": other.head}
    signed = json.loads(lines[3])
    signed["statement"]["head"] = other.head
    for number, line, complaint in (
        (2, forged | {"head": "00" * 32}, "does not follow"),
        (3, signed, "a statement about other rounds"),
    ):
        spoiled = list(lines)
        spoiled[number] = json.dumps(line)
        path.write_text("\n".join(spoiled) + "\n")
        with pytest.raises(WireError, match=f":{number + 1}: cut or foreign: .*{complaint}"):
            read_heads(path)
    path.write_text("\n".join([*lines[:2], json.dumps(forged), json.dumps(signed)]) + "\n")
    with pytest.raises(WireError, match="the signature over round 2 does not fit"):
        read_heads(path)


def test_files_of_different_federations_or_runs_are_not_compared(tmp_path):
    """Kills: a false alarm about an honest server."""
    one, two = federation(tmp_path / "1", "anna"), federation(tmp_path / "2", "anna")
    follow(one, "anna", history(b"one")), follow(two, "anna", history(b"ONE"))
    with pytest.raises(FederationError, match="of federations"):
        compare_heads(tmp_path / "1" / "anna", tmp_path / "2" / "anna")
    ends = federation(tmp_path / "3", "anna", "bert")
    follow(ends, "anna", history(b"one"))
    ends.round_trip("bert", ask(history(b"ONE"), 1), ends.server(1, "ee" * 16))
    with pytest.raises(FederationError, match="of 2 different runs"):
        compare_heads(tmp_path / "3" / "anna", tmp_path / "3" / "bert")
    with pytest.raises(RunError, match="no such file"):
        compare_heads(tmp_path / "nobody", tmp_path / "3" / "bert")


def test_a_server_that_takes_rounds_back_is_refused_also_after_a_restart(tmp_path):
    """Kills: a memory that ends with the process; an older history that passes because its chain is whole."""
    ends = federation(tmp_path, "anna")
    follow(ends, "anna", history(b"one", b"two"))
    for restarted in (False, True):
        if restarted:
            ends.start("anna")
        request = ends.request("anna", ask(history(b"one"), 1))
        with pytest.raises(HistoryError, match="took rounds back: it offers 1, but signed round 2 before"):
            ends.reply("anna", request)


def test_a_server_that_rewrites_a_round_is_refused(tmp_path):
    """Kills: looking at the number of rounds alone; believing a longer history."""
    ends = federation(tmp_path, "anna")
    follow(ends, "anna", history(b"one", b"two"))
    with pytest.raises(HistoryError, match="shows another round 2 than it signed before"):
        ends.reply("anna", ends.request("anna", ask(history(b"one", b"TWO"), 1)))
    with pytest.raises(HistoryError, match="round 2 leads to head"):
        ends.reply("anna", ends.request("anna", ask(history(b"one", b"TWO", b"three"), 1)))
    silent = Request("train", {"round": 3, "first": 1})
    assert "does not say on which history it stands" in ends.round_trip("anna", silent).error


def test_a_request_of_another_run_is_refused_once_a_round_was_signed(tmp_path):
    """Kills: a folder that silently moves to another run."""
    ends = federation(tmp_path, "anna")
    other = ends.server(2, "ee" * 16)
    follow(ends, "anna", history(b"one"))
    ends.start("anna")
    reply = ends.round_trip("anna", ask(history(b"one"), 2), other)
    assert "it belongs to run eeeeeeee, this client's folder to run 0f0f0f0f" in reply.error


def test_a_cut_line_is_no_round_and_a_folder_of_another_client_is_refused(tmp_path):
    """Kills: a crash while writing that locks a client out; two clients in one folder."""
    ends = federation(tmp_path, "anna", "bert")
    follow(ends, "anna", history(b"one"))
    whole = (tmp_path / "anna" / HEADS).read_bytes()
    follow(ends, "anna", history(b"one", b"two"))
    longer = (tmp_path / "anna" / HEADS).read_bytes()
    (tmp_path / "anna" / HEADS).write_bytes(longer[:-5])
    assert read_heads(tmp_path / "anna").rounds == 1
    ends.followers["anna"].round, ends.followers["anna"].head = 1, history(b"one").head
    ends.start("anna")
    ends.followers["anna"].heads = ends.heads["anna"]
    follow(ends, "anna", history(b"one", b"two"))
    assert read_heads(tmp_path / "anna").rounds == 2
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / HEADS).write_bytes(whole)
    with pytest.raises(FederationError, match="kept by client 'anna'"):
        ends.start("bert")


def test_a_run_keeps_its_name_and_its_starts_only_rise(tmp_path, monkeypatch):
    """Kills: a new run at every start; a clock that was set back and makes all requests look old."""
    first = open_identity(tmp_path)
    monkeypatch.setattr("kilotune.engine.rounds.identity.time.time", lambda: 5.0)
    second, third = open_identity(tmp_path), open_identity(tmp_path)
    assert {identity.run for identity in (first, second, third)} == {first.run}
    assert first.start < second.start < third.start
    monkeypatch.setattr("kilotune.engine.rounds.identity.time.time", lambda: first.start + 1000.0)
    os.replace(tmp_path / "identity.json", tmp_path / "backup")
    (tmp_path / "identity.json").write_text(json.dumps(dataclasses.asdict(first)))  # restored from before the others
    assert open_identity(tmp_path).start > third.start
    (tmp_path / "identity.json").write_text('{"run": "xy", "start": 1}')
    with pytest.raises(RunError, match="cut or foreign"):
        open_identity(tmp_path)


FORBIDDEN = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
RUNS_CODE = {"eval", "exec", "__import__"}


@pytest.mark.parametrize("path", sorted(Path(kilotune.__file__).parent.rglob("*.py")), ids=lambda p: p.name)
def test_bytes_are_never_unpickled_or_run(path):
    """Kills: any way for bytes from a file or the network to become code."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not FORBIDDEN & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in FORBIDDEN
        elif isinstance(node, ast.Call):
            assert not (isinstance(node.func, ast.Name) and node.func.id in RUNS_CODE)
            assert not any(word.arg == "allow_pickle" for word in node.keywords)
            loads = isinstance(node.func, ast.Attribute) and node.func.attr == "load"
            assert not (loads and isinstance(node.func.value, ast.Name) and node.func.value.id == "torch")
