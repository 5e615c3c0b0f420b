"""Simulated clients: many in one process, with the same result as if each had everything in memory."""

import json

import pytest
import torch

from federating import plan, quiet, write_rows
from kilotune.core.errors import DataError
from kilotune.engine import simulation
from kilotune.engine.rounds.clientstate import ClientState, RoundLog
from kilotune.engine.rows.shares import split_rows
from kilotune.engine.session import federate
from kilotune.engine.simulation import PackedRows

FEW = ("schedule={name: uniform, clients_per_round: 3}", "local_steps=1", "batch_size=2")


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """Rows of nine clients."""
    return write_rows(tmp_path_factory.mktemp("crowd") / "rows.jsonl", 8, tuple(f"c{n}" for n in range(9)))


@pytest.fixture(scope="module")
def roomy(base, crowd, tmp_path_factory):
    """The run of the crowd in which every row stays tokenised."""
    return federate(plan(base, crowd, "kilotune", "rounds=3", *FEW), tmp_path_factory.mktemp("roomy"), quiet)


def same(a: dict, b: dict) -> bool:
    keys = ("digest", "ledger_head", "payload_up_bytes_per_client_round", "payload_down_bytes_per_client_round")
    return all(a[key] == b[key] for key in keys) and a["eval"] == b["eval"]


def test_how_many_rows_stay_tokenised_changes_nothing(base, crowd, tmp_path, roomy, monkeypatch):
    """Kills: rows that lose their order or client when they are packed, unpacked and tokenised anew."""
    monkeypatch.setattr(simulation, "KEPT_ROWS", 13)
    recipe = plan(base, crowd, "kilotune", "rounds=3", *FEW)
    assert same(federate(recipe, tmp_path / "run", quiet), roomy)


def test_packed_rows_are_the_rows(base, crowd, monkeypatch):
    clients = split_rows(plan(base, crowd), alone=False).clients
    monkeypatch.setattr(simulation, "KEPT_ROWS", 0)
    packed = PackedRows(clients)
    assert {name: packed.of(name) for name in clients} == clients
    assert packed.counts == dict.fromkeys(clients, 6)
    assert all(isinstance(rows, bytes) for rows in packed._rows.values())


@pytest.mark.parametrize(("moment", "kept"), [(1, 13), (3, 4096)])
def test_a_killed_run_of_clients_without_memory_goes_on_as_if_nothing_had_been(
    base, crowd, tmp_path, roomy, moment, kept, monkeypatch
):
    """Kills: a client that forgets what it holds, so that it is sent and counted too much; answers lost."""
    monkeypatch.setattr(simulation, "KEPT_ROWS", kept)
    recipe, answered = plan(base, crowd, "kilotune", "rounds=3", *FEW), []

    def dying(event):
        if event["event"] == "client" and event.get("round") == moment:
            answered.append(event["client"])
            if len(answered) == 2:
                raise Killed

    with pytest.raises(Killed):
        federate(recipe, tmp_path / "run", dying)
    steps = []

    def watching(event):
        if event["event"] == "progress" and f"round {moment} step" in event["what"]:
            steps.append(event["what"].split(":")[0])

    assert same(federate(recipe, tmp_path / "run", watching), roomy)
    assert len(set(steps)) == 1  # of three, two had answered and are not asked to train again
    assert not set(steps) & set(answered)


@pytest.mark.parametrize(("guarded", "written"), [("true", []), ("false", ["answers-00002.bin"])])
def test_clients_without_memory_leave_no_folders(base, crowd, tmp_path, guarded, written):
    """Kills: ten thousand folders; a state that is written though nothing will ever read it; answers that are written
    a second time beside the server's book."""
    federate(plan(base, crowd, "kilotune", "rounds=2", *FEW, f"defences.enabled={guarded}"), tmp_path / "run", quiet)
    assert not (tmp_path / "run" / "clients").exists()
    assert [path.name for path in (tmp_path / "run" / "state").glob("answers-*")] == written


def test_a_row_that_cannot_be_learnt_ends_the_run_even_when_it_is_read_late(base, tmp_path, monkeypatch):
    """Kills: a client that silently drops out of every round because of its data."""
    path = write_rows(tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[-2] = {"client": "cyd", "split": "train", "strange": 1}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kept in (4096, 3):
        monkeypatch.setattr(simulation, "KEPT_ROWS", kept)
        with pytest.raises(DataError, match=r"rows\.jsonl:35"):
            federate(plan(base, path), tmp_path / str(kept), quiet)


def test_a_round_log_returns_whole_answers_of_the_same_history_only(tmp_path):
    """Kills: a cut answer that counts; an answer from before another history or of another round."""
    log = RoundLog(tmp_path)
    for name in ("ada", "bob"):
        log.add(name, 3, "aa", (name.encode() * 9 + b"\n{}", {"loss": 1.5, "loss_first": 2.5}))
    path = tmp_path / "answers-00003.bin"
    path.write_bytes(path.read_bytes()[:-1])
    again = RoundLog(tmp_path)
    assert again.answer("ada", 3, "aa") == (b"ada" * 9 + b"\n{}", {"loss": 1.5, "loss_first": 2.5})
    assert again.answer("ada", 3, "bb") is None
    assert again.answer("bob", 3, "aa") is None
    again.add("bob", 3, "aa", (b"new", {}))
    assert RoundLog(tmp_path).answer("bob", 3, "aa") == (b"new", {})
    assert RoundLog(tmp_path).answer("ada", 4, "aa") is None
    assert not path.exists()


def test_a_client_state_keeps_the_last_two_rounds(tmp_path):
    """Kills: a folder that grows by one file a round; an answer given after another history."""
    state = ClientState(tmp_path)
    for number in (1, 4, 6):
        remembered = {"estimator/step": torch.tensor(number), "codec/residual": torch.ones(2) * number}
        state.save(number, f"head{number}", remembered, (bytes([number]), {"loss_first": 1.0, "loss": 0.1}))
    again = ClientState(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-00004.safetensors", "state-00006.safetensors"]
    assert again.answer(6, "head6") == (b"\x06", {"loss_first": 1.0, "loss": 0.1})
    assert again.answer(6, "head5") is None
    memory, codec = again.before(6)
    assert int(memory.estimator["step"]) == 4
    assert codec["residual"].tolist() == [4.0, 4.0]
    assert again.before(4)[1] == {}
