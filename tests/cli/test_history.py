"""Withdraw, unlearn and audit as a user meets them."""

import json
import shutil

import pytest
from command_line import federated, kilotune, small


@pytest.fixture(scope="module")
def run(base, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("history") / "run"
    settings = federated(base, data, "evaluation.generate=false")
    assert kilotune("federate", *settings, "-o", folder, "--format", "json").code == 0
    return folder, settings


@pytest.fixture(scope="module")
def left(run, tmp_path_factory):
    """The run without bob."""
    output = tmp_path_factory.mktemp("left") / "new"
    return output, kilotune("withdraw", run[0], "bob", "-o", output, "--format", "json").json


def test_withdraw_writes_a_run_and_its_certificate(run, left):
    """Kills: a new run that other commands cannot read; a result that is not the certificate's."""
    output, result = left
    assert json.loads((output / "withdrawal-001.json").read_text())["new"] == result["new"]
    replayed = kilotune("replay", output, "--format", "json").json
    assert (replayed["digest"], replayed["ledger_head"]) == (result["new"]["digest"], result["new"]["head"])
    assert kilotune("replay", output / "final.seed", "--format", "json").json["digest"] == result["new"]["digest"]
    assert "Client bob was taken out" in (output / "report.html").read_text()
    assert [part["round"] for part in result["removed"]] == [1, 2]


def test_withdraw_says_what_is_exact_and_what_is_not(run, tmp_path):
    ended = kilotune("withdraw", run[0], "ada", "-o", tmp_path / "new")
    assert ended.code == 0
    assert "approximate for its later influence" in " ".join(ended.err.split())
    assert "taken out of the run: ada" in ended.out


def test_a_certificate_is_checked_from_the_command_line(left, tmp_path):
    output, result = left
    path = output / "withdrawal-001.json"
    checked = kilotune("withdraw", "--verify", path, "--run", output, "--signer", result["fingerprint"]).err
    assert "fits: signature, signer, head, digest, base, absence of the client" in " ".join(checked.split())
    changed = tmp_path / "changed.json"
    changed.write_text(path.read_text().replace('"client": "bob"', '"client": "bop"'))
    ended = kilotune("withdraw", "--verify", changed)
    assert ended.code == 2
    assert "the signature does not fit" in ended.err


def test_the_rest_goes_on_without_who_left(run, tmp_path):
    """Kills: a client that comes back because its rows are still in the file."""
    new = tmp_path / "new"
    assert kilotune("withdraw", run[0], "cyd", "-o", new, "--how", "replay", "--format", "json").json["rounds"] == 0
    summary = kilotune("federate", *run[1], "-o", new, "--format", "json").json
    assert summary["rounds"] == 2
    assert '"cyd"' not in (new / "ledger.jsonl").read_text()


def test_exclude_changes_nothing_but_who_is_asked(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "copy")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert kilotune("withdraw", folder, "bob", "--exclude", "--format", "json").json["excluded"] == "bob"
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path.name for path in after.keys() - before.keys()} == {"withdrawn.json"}
    assert {path: after[path] for path in before} == before


def test_withdraw_without_enough_words_says_what_is_missing(run):
    ended = kilotune("withdraw", run[0])
    assert ended.code == 2
    assert "needs RUN, CLIENT and --output" in ended.err


def test_audit_prints_a_line_a_round_and_ends_with_one_when_something_does_not_fit(run, data, tmp_path):
    """Kills: success although a round does not add up."""
    found = kilotune("replay", run[0], "--audit", "--format", "json").json
    assert [entry["recombines"] for entry in found["rounds"]] == [True, True]
    shown = kilotune("replay", run[0], "--audit", "--contribution", data)
    assert shown.code == 0
    assert all(entry["digest"][:8] in shown.out for entry in found["rounds"])
    assert "contribution" in shown.out
    folder = shutil.copytree(run[0], tmp_path / "copy")
    path = folder / "contributions" / "00002.bin"
    path.write_bytes(path.read_bytes()[:-1])
    ended = kilotune("replay", folder, "--audit")
    assert ended.code == 1
    assert "round 2: " in ended.err
    assert "'cyd' is missing or cut" in " ".join(ended.err.split())


def test_unlearn_forgets_rows_and_serves_what_is_left(base, data, tmp_path):
    settings = small(
        base,
        data,
        "steps=4",
        "evaluation.generate=false",
        "sharding.slices=2",
        "parametrization.config={r: 2, lora_alpha: 4, target_modules: [q_proj]}",
    )
    command = ("tune", "local_unlearning", *settings, "-o", tmp_path / "run", "--format", "json")
    before = kilotune(*command).json
    assert before["sharding"] == {"serving": [[0, 1]], "survives": [1], "train_again": [], "rows_left": 27}
    first = next(line for line in data.read_text().splitlines() if json.loads(line)["split"] == "train")
    (tmp_path / "forget.jsonl").write_text(first + "\n")
    after = kilotune("unlearn", tmp_path / "run", "--rows", tmp_path / "forget.jsonl", "--format", "json").json
    assert (after["rows"], after["rows_left"], len(after["serving"][0])) == (1, 26, 1)
    measured = kilotune("evaluate", tmp_path / "run", "-d", data, "--max-new-tokens", 0, "--format", "json").json
    assert measured["overall"]["loss"] > 0
    assert kilotune(*command).json["sharding"]["serving"] == [[0, 1]]
    ended = kilotune("unlearn", tmp_path, "--rows", tmp_path / "forget.jsonl")
    assert ended.code == 1
    assert "only from a run with sharding" in " ".join(ended.err.split())
