"""What goes wrong for a user: one clear line (one per mistake in a recipe), the right exit code, and nothing lost.

Exit code 2 is a mistake in the input, 1 a world or a run folder that cannot be used, 130 Ctrl-C.
"""

import errno
import hashlib
import json
import os
import shutil
import signal
import socket
from dataclasses import replace

import pytest
from command_line import federated, kilotune, small

from kilotune.cli.display import Display
from kilotune.core.errors import KilotuneError
from kilotune.engine import files, memory
from kilotune.engine.afterwards import seedfile
from kilotune.engine.model import sources
from kilotune.engine.rounds.ledger import LEDGER, Ledger, canonical
from kilotune.engine.runfolder import RunFolder
from tiny import save_tiny

QUICK = ("evaluation.generate=false", "local_steps=1", "batch_size=2", "evaluation.limit=3")


@pytest.fixture(scope="module")
def other_base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("other") / "tiny", seed=9)


@pytest.fixture(scope="module")
def settings(base, data):
    return federated(base, data, *QUICK)


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory):
    """A finished run that nothing happened to: its folder and summary."""
    folder = tmp_path_factory.mktemp("run") / "out"
    return folder, kilotune("federate", *settings, "-o", folder, "--format", "json").json


@pytest.fixture
def copy(undisturbed, tmp_path):
    """The finished run's folder, to be spoilt."""
    return shutil.copytree(undisturbed[0], tmp_path / "copy")


def refused(ended, code, *words, lines=1):
    """The command ended with this code and red lines that hold all these words, and said nothing on stdout."""
    assert "Traceback" not in ended.err
    assert ended.code == code, ended.err
    assert ended.out == ""
    told = ended.err.splitlines()[-lines:]
    assert len([line for line in told if line.strip()]) == lines, ended.err
    for word in words:
        assert str(word) in "\n".join(told), ended.err


def result(summary):
    """What a run must give again: all but the clock and the memory."""
    return {key: value for key, value in summary.items() if key not in ("seconds", "peak_rss_bytes")}


# -- recipes ----------------------------------------------------------------------------------------------------------


def test_an_unknown_key_is_refused_with_the_nearest_name():
    refused(kilotune("recipe", "check", "kilotune", "--set", "optimiser=sgd"), 2, "optimiser", "'optimizer'")
    refused(kilotune("plan", "kilotune", "--set", "data.max_lenght=9"), 2, "data.max_lenght", "'max_length'")
    refused(kilotune("federate", "--set", "basis.sise=9"), 2, "basis.sise: no such key", "'size'")
    refused(kilotune("federate", "kilotun"), 2, "got 'kilotun'", "Did you mean 'kilotune'?")
    refused(kilotune("tune", "local_lora", "-s", "optimizer.name=adamv"), 2, "optimizer.name", "'adamw'")
    refused(kilotune("methods", "--kind", "codecs"), 2, "--kind: got 'codecs'", "'codec'")


def test_all_errors_of_a_recipe_are_shown_at_once(tmp_path):
    """Kills: one mistake shown per attempt."""
    recipe = tmp_path / "own.yaml"
    recipe.write_text("rouns: 3\nrounds: 0\nbatch_size: many\noptimizer: {name: adamw, lr: -1}\nbasis: {name: tield}\n")
    ended = kilotune("federate", recipe, "-o", tmp_path / "run")
    refused(ended, 2, "rouns", "rounds: got 0", "batch_size: got 'many'", "optimizer.lr: got -1", "'tield'", lines=5)
    assert not (tmp_path / "run").exists()


def test_parts_that_do_not_fit_are_named_with_a_pair_that_does():
    ended = kilotune(
        "recipe",
        "check",
        "kilotune",
        "-s",
        "uplink={name: seed_scalar}",
        "-s",
        "server_optimizer={name: sgd, lr: auto}",
    )
    refused(
        ended, 2, "uplink 'seed_scalar' needs 'seed_log'", "Use optimizer:", "server_optimizer.lr: got 'auto'", lines=4
    )


def test_overrides_are_read_strictly():
    """Kills: an assignment without a value that is dropped in silence; a YAML library's traceback."""
    ended = kilotune("federate", "--set", "rounds", "--set", "=3", "--set", "data={path: [")
    refused(ended, 2, "--set rounds: expected KEY=VALUE", "--set =3:", "--set data={path: [: not YAML", lines=3)
    refused(kilotune("federate", "--set", "rounds.more=3"), 2, "rounds is a value, not a section")


def test_a_recipe_file_must_be_readable_yaml(tmp_path):
    (tmp_path / "broken.yaml").write_text("rounds: 3\n  basis: [\n")
    refused(kilotune("recipe", "check", tmp_path / "broken.yaml"), 2, "broken.yaml:2: not YAML")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    refused(kilotune("recipe", "check", tmp_path / "binary.yaml"), 2, "binary.yaml: cannot be read as text")
    (tmp_path / "list.yaml").write_text("- 1\n")
    refused(kilotune("recipe", "check", tmp_path / "list.yaml"), 2, "got list, expected a mapping")


def test_a_recipe_under_the_wrong_command_says_which_keys_do_not_belong():
    refused(kilotune("federate", "local_lora"), 2, "rounds: missing", "steps: has no effect in a federation", lines=2)
    ended = kilotune("tune", "kilotune")
    refused(ended, 2, "steps: missing", "rounds: has no effect", "aggregation: has no effect", lines=4)


# -- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["federate", "plan", "data show", "evaluate", "client"])
def test_data_errors_name_file_and_line(base, tmp_path, command):
    """Kills: a bad row that is skipped, or found only after the model was trained."""
    good = '{"instruction": "a", "output": "b", "client": "ada", "split": "test"}\n'.replace("test", "train")
    file = tmp_path / "rows.jsonl"
    keys = tmp_path / "keys"
    commands = {
        "federate": ["federate", *federated(base, file, *QUICK), "-o", tmp_path / "run"],
        "plan": ["plan", "kilotune", *federated(base, file, *QUICK), "--no-probe"],
        "data show": ["data", "show", file, "--base", base],
        "evaluate": ["evaluate", base, "-d", file, "--split", "train"],
        "client": ["client", keys / "ada.join", "-d", file, "-s", f"base={base}", "-o", tmp_path / "run"],
    }
    if command == "client":
        assert kilotune("server", "init", keys, "-c", "ada").code == 0
    file.write_text(good * 2 + '{"instruction": "a", \n' + good)
    refused(kilotune(*commands[command]), 2, f"{file}:3: not valid JSON")
    file.write_text(good + '{"instruction": "a", "client": "ada"}\n' + good)
    refused(kilotune(*commands[command]), 2, f"{file}:2:", "field 'output' is missing; found 'instruction'")
    file.unlink()
    (tmp_path / "row.jsonl").write_text(good)
    refused(kilotune(*commands[command]), 2, f"{file}: no such file", "Did you mean 'row.jsonl'?")


def test_rows_that_are_not_there_are_counted(base, data, settings, tmp_path):
    ended = kilotune("evaluate", base, "-d", data, "--split", "valid")
    refused(ended, 2, "no row of split 'valid'", "9 test, 27 train")
    ended = kilotune("federate", *settings, "-s", "data.only=dan", "-o", tmp_path / "run")
    refused(ended, 2, f"{data}: got 36 rows, but no training row of client 'dan'")


@pytest.mark.parametrize(
    "options",
    [
        ("evaluate", "x", "-d", "y", "--template", "alpac"),
        ("evaluate", "x", "-d", "y", "--limit", "0"),
        ("evaluate", "x", "-d", "y", "--max-length", "1"),
        ("data", "show", "y", "--template", "none"),
        ("plan", "--clients", "0"),
        ("chat", "x", "--format", "json"),
        ("chat", "x", "--temperature", "-1"),
        ("federate", "--format", "yaml"),
        ("server", "init", "keys"),
        ("evaluate",),
        ("tun",),
    ],
    ids=" ".join,
)
def test_impossible_options_end_with_2_before_anything_is_loaded(options):
    """Kills: a value that is taken and gives nonsense, or a library's traceback, later."""
    ended = kilotune(*options)
    assert ended.code == 2
    assert ended.out == ""
    assert "Error" in ended.err
    assert "Traceback" not in ended.err


# -- models -----------------------------------------------------------------------------------------------------------


def test_a_model_that_will_not_fit_is_refused_before_it_is_loaded(base, data, settings, tmp_path, monkeypatch):
    """Kills: a check after the weights are in memory; a message without the two sizes."""
    monkeypatch.setattr(memory, "free_bytes", lambda: 50_000)
    monkeypatch.setattr(sources, "read_model", lambda *_: pytest.fail("loaded"))
    for command in (
        ("federate", *settings, "-o", tmp_path / "run"),
        ("evaluate", base, "-d", data),
        ("chat", base, "-p", "hello"),
        ("plan", *settings),
    ):
        refused(kilotune(*command), 2, f"base {str(base)!r} needs 0.0 GB in float32", "are free. Use a smaller base")


def test_a_base_that_cannot_be_had_is_one_line(data, tmp_path, monkeypatch):
    import httpx
    import huggingface_hub

    class Offline:
        def model_info(self, *_, **__):
            raise httpx.ConnectError("no route")

    monkeypatch.setattr(huggingface_hub, "HfApi", Offline)
    ended = kilotune("evaluate", "someone/unknown-model", "-d", data)
    refused(ended, 2, "base 'someone/unknown-model': no such folder, and the Hugging Face hub cannot be reached")
    refused(kilotune("chat", "smollm2-135", "-p", "x"), 2, "base 'smollm2-135'", "Did you mean 'smollm2-135m'?")
    refused(kilotune("chat", tmp_path / "nothing", "-p", "x"), 2, "no such file or folder")
    refused(kilotune("chat", tmp_path, "-p", "x"), 2, "the folder holds neither config.json nor a GGUF file")


# -- seed files and ledgers -------------------------------------------------------------------------------------------


def test_another_base_is_refused_with_both_digests(other_base, settings, undisturbed, copy, data, tmp_path):
    """Kills: a fine-tune put on the wrong weights without a word."""
    folder, summary = undisturbed
    ours = summary["base_digest"][:16]
    for command in (
        ("apply", folder / "final.seed", "--base", other_base, "-o", tmp_path / "out"),
        ("merge", folder, "--base", other_base, "-o", tmp_path / "out"),
        ("replay", folder, "--base", other_base),
        ("evaluate", folder / "final.seed", "--base", other_base, "-d", data),
    ):
        refused(kilotune(*command), 2, "has digest", f"these rounds stand on {ours}", "Give that model with --base")
    assert not (tmp_path / "out").exists()
    ended = kilotune("federate", *settings, "-s", f"base={other_base}", "-o", copy)
    refused(ended, 1, f"this run stands on base {ours}, got", "or another --output")


def test_a_base_that_has_moved_can_be_given(base, copy):
    """A seed file names the base where its author had it."""
    lines = (copy / LEDGER).read_text().splitlines()
    header = json.loads(lines[0]) | {"base": "/elsewhere/tiny"}
    (copy / LEDGER).write_text("\n".join([canonical(header).decode(), *lines[1:]]) + "\n")
    refused(kilotune("replay", copy), 2, "base '/elsewhere/tiny': no such file or folder", "give it with --base")
    assert kilotune("replay", copy, "--base", base, "--format", "json").json["verified"] is True


def test_a_cut_or_foreign_seed_file_is_refused(base, undisturbed, tmp_path):
    folder, summary = undisturbed
    raw = (folder / "final.seed").read_bytes()
    file, to = tmp_path / "x.seed", ("--base", base, "-o", tmp_path / "out")
    refused(kilotune("apply", file, *to), 2, f"{file}: no such seed file")
    file.write_bytes(raw[:-40])
    for command in (("apply", file, *to), ("replay", file), ("chat", file, "-p", "x")):
        refused(kilotune(*command), 2, f"{file}: cut or altered", "Copy it again")
    file.write_bytes(b"PK\x03\x04" + raw)
    refused(kilotune("apply", file, *to), 2, "this is no seed file")
    refused(kilotune("apply", tmp_path, *to), 2, f"{tmp_path}: no such seed file")
    assert not (tmp_path / "out").exists()
    renamed = tmp_path / "renamed.bin"
    renamed.write_bytes(raw)
    assert kilotune("replay", renamed, "--format", "json").json["digest"] == summary["digest"]


def forge(raw, change):
    """A seed file with altered facts and a checksum that fits."""
    size = int.from_bytes(raw[4:8], "little")
    facts = json.loads(raw[8 : 8 + size])
    change(facts)
    text = canonical(facts)
    body = raw[:4] + len(text).to_bytes(4, "little") + text + raw[8 + size : -32]
    return body + hashlib.sha256(body).digest()


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts["records"][0].update(root=-1),
        lambda facts: facts["records"][0].update(root="x"),
        lambda facts: facts["records"][0].update(contributions=None),
        lambda facts: facts["records"][0]["contributions"][0].update(weight=0.9),
        lambda facts: facts["records"].pop(),
        lambda facts: facts["records"].reverse(),
        lambda facts: facts["header"].update(format=2),
        lambda facts: facts["header"].update(noise_spec=2),
        lambda facts: facts["header"].update(recipe=[]),
        lambda facts: facts["header"]["recipe"].update(local_steps=7),
        lambda facts: facts["header"]["recipe"]["basis"].update(size=32),
        lambda facts: facts.pop("header"),
    ],
)
def test_a_forged_seed_file_is_refused_without_a_traceback(undisturbed, tmp_path, change):
    """Kills: a file from elsewhere that crashes, or is applied although its chain or recipe was altered.

    Rounds taken off the end are a valid shorter run; everything else must be seen.
    """
    folder, summary = undisturbed
    file = tmp_path / "x.seed"
    file.write_bytes(forge((folder / "final.seed").read_bytes(), change))
    ended = kilotune("replay", file, "--format", "json")
    if ended.code == 0:
        assert len(seedfile.read(file)) == 1
        assert ended.json["digest"] != summary["digest"]
    else:
        refused(ended, 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"noise_spec": 2}, "noise follows spec 2"), ({"recipe_id": "0" * 16}, "its header says 0000000000000000")],
)
def test_a_sound_seed_file_of_another_version_is_refused(undisturbed, tmp_path, change, said):
    """Kills: weights from noise or values that this version reads differently. The chain itself is in order."""
    ledger = Ledger.load(undisturbed[0])
    other = Ledger(replace(ledger.header, **change))
    for record, payload in ledger.since(0):
        other.append(record.root, payload, record.contributions)
    seedfile.write(other, tmp_path / "x.seed")
    refused(kilotune("replay", tmp_path / "x.seed"), 2, said)


def test_a_cut_ledger_line_is_no_round_and_an_altered_one_is_refused(settings, undisturbed, copy):
    """Kills: a run that a crash has made unusable; a replay that believes what it reads."""
    whole = (copy / LEDGER).read_bytes()
    (copy / LEDGER).write_bytes(whole[:-9])
    assert kilotune("replay", copy, "--format", "json").json["rounds"] == 1
    assert (copy / LEDGER).read_bytes() == whole[:-9]  # looking changes nothing: a server may be at work there
    resumed = kilotune("federate", *settings, "-o", copy, "--format", "json").json
    assert result(resumed) == result(undisturbed[1])
    (copy / LEDGER).write_bytes(whole.replace(b'"num_examples":9', b'"num_examples":8', 1))
    refused(kilotune("replay", copy), 2, "the chain is broken")
    (copy / LEDGER).write_bytes(whole)
    payload = copy / "payloads" / "00002.bin"
    payload.write_bytes(payload.read_bytes()[:-1])
    refused(kilotune("evaluate", copy, "-d", "households", "--limit", "1"), 2, "the chain is broken")
    payload.unlink()
    refused(kilotune("replay", copy), 2, "00002.bin: missing")
    (copy / LEDGER).write_bytes(b"{}\n")
    for foreign in (b"{}\n", b"[]\n", b"PK\x03\x04\n", b""):
        (copy / LEDGER).write_bytes(foreign)
        refused(kilotune("replay", copy), 2, f"{copy / LEDGER}:1: cut or foreign")
    (copy / LEDGER).write_bytes(whole.replace(b'"root":', b'"root":-', 1))
    refused(kilotune("replay", copy), 2, f"{copy / LEDGER}:2: cut or foreign")


# -- run folders ------------------------------------------------------------------------------------------------------


def test_a_folder_of_another_recipe_is_refused_with_both_ids(settings, undisturbed, copy, tmp_path, base, data):
    ids = [
        kilotune("recipe", "check", "kilotune", *settings, "-s", f"optimizer.lr={lr}", "--format", "json").json
        for lr in (2.5e-2, 0.5)
    ]
    ended = kilotune("federate", *settings, "-s", "optimizer.lr=0.5", "-o", copy)
    refused(ended, 1, *(each["recipe_id"] for each in ids), "or another --output")
    assert kilotune("replay", copy, "--format", "json").json["digest"] == undisturbed[1]["digest"]
    lora = small(base, data, "steps=1", *QUICK)
    assert kilotune("tune", "local_lora", *lora, "-o", tmp_path / "lora").code == 0
    ended = kilotune("tune", "local_lora", *lora, "-s", "optimizer.lr=0.5", "-o", tmp_path / "lora")
    refused(ended, 1, "its checkpoint follows recipe", "or another --output")
    refused(kilotune("replay", tmp_path / "lora"), 1, "keeps a checkpoint and no ledger", "kilotune evaluate")


def test_a_folder_in_use_is_refused(settings, undisturbed, copy):
    """Kills: two processes that write one ledger. (A lock is of the open file: this process counts as another.)"""
    with RunFolder(copy).locked():
        refused(
            kilotune("federate", *settings, "-o", copy), 1, f"{copy}: another kilotune process works in this folder"
        )
    assert kilotune("replay", copy, "--format", "json").json["digest"] == undisturbed[1]["digest"]


def test_what_cannot_be_done_with_a_folder_is_said(settings, undisturbed, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(kilotune("federate", *settings, "-o", tmp_path / "file"), 1, f"{tmp_path / 'file'}", "Choose another")
    refused(kilotune("federate", *settings, "-o", tmp_path / "file" / "run"), 1, "Choose another")
    refused(kilotune("data", "households", "-o", tmp_path), 1, f"{tmp_path}", "Choose another")
    refused(kilotune("replay", tmp_path), 1, "no ledger.jsonl there, so it is no run folder")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    ended = kilotune("merge", undisturbed[0], "-o", tmp_path / "mine")
    refused(ended, 2, "exists and is no exported model")
    ended = kilotune("export", undisturbed[0], "--to", "peft", "-o", tmp_path / "adapter")
    refused(ended, 2, "a PEFT folder holds an adapter, but this is subspace. Use --to hf.")
    assert [entry.name for entry in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "adapter").exists()


def test_a_run_whose_state_is_gone_or_cut_is_refused(settings, copy):
    """Kills: going on from zeros where moments and residuals should be; a traceback from a file's library."""
    state = copy / "state" / "server-00002.safetensors"
    state.write_bytes(state.read_bytes()[:20])
    refused(kilotune("federate", *settings, "-o", copy), 1, f"{state}: cut or foreign", "or use another --output")
    state.unlink()
    refused(kilotune("federate", *settings, "-o", copy), 1, f"{state}: missing, so the run cannot go on")


def fill_disk(monkeypatch, after):
    """The disk takes `after` writes; the next one arrives cut, and is told that no space is left."""
    left = after
    sync = os.fsync

    def full(descriptor):
        nonlocal left
        left -= 1
        if left < 0:
            os.ftruncate(descriptor, max(0, os.fstat(descriptor).st_size - 5))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(settings, undisturbed, tmp_path, monkeypatch):
    """Kills: a cut file that is believed, a cut line that swallows the next one, a round that counts twice."""
    folder, attempts = tmp_path / "run", 0
    while True:
        with monkeypatch.context() as patch:
            fill_disk(patch, after=2 + 2 * attempts)
            ended = kilotune("federate", *settings, "-o", folder, "--format", "json")
        if ended.code == 0:
            break
        refused(ended, 1, "the disk is full. Free some space and run the same command again")
        attempts += 1
    assert attempts >= 3
    assert ended.json["digest"] == undisturbed[1]["digest"]
    assert ended.json["ledger_head"] == undisturbed[1]["ledger_head"]
    # Parts that went out in an attempt whose round was not committed are not counted again by the next one.
    down = "payload_down_bytes_per_client_round"
    ended_with, alike = result(ended.json), result(undisturbed[1])
    assert ended_with.pop(down) <= alike.pop(down)
    assert ended_with == alike
    rounds = [event["round"] for event in RunFolder(folder).events() if event["event"] == "round"]
    assert set(rounds) <= {1, 2}
    assert kilotune("replay", folder, "--format", "json").json["verified"] is True


def press_ctrl_c(monkeypatch, happens):
    """Ctrl-C at the first event for which `happens` is true."""
    show = Display.__call__

    def pressing(self, event):
        show(self, event)
        if happens(event):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Display, "__call__", pressing)


MOMENTS = (
    {"event": "evaluation", "round": 0},
    {"event": "client", "round": 1, "client": "bob"},
    {"event": "round", "round": 1},
    {"event": "evaluation", "round": 2},
)


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(settings, undisturbed, tmp_path, monkeypatch):
    """Kills: a traceback on Ctrl-C; an exit code of success; a run that differs for having been interrupted."""
    command = ("federate", *settings, "-o", tmp_path / "run", "--format", "json")
    for moment in MOMENTS:
        with monkeypatch.context() as patch:
            press_ctrl_c(patch, lambda event, moment=moment: moment.items() <= event.items())
            refused(kilotune(*command), 130, "interrupted. Run the same command again to go on.")
    assert result(kilotune(*command).json) == result(undisturbed[1])


def test_ctrl_c_while_tuning_goes_on_too_and_elsewhere_promises_nothing(base, data, tmp_path, monkeypatch):
    lora = ("tune", "local_lora", *small(base, data, "steps=4", *QUICK), "--format", "json", "-o")
    whole = kilotune(*lora, tmp_path / "whole").json
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, lambda event: event["event"] == "step" and event["step"] == 3)
        refused(kilotune(*lora, tmp_path / "cut"), 130, "interrupted. Run the same command again to go on.")
        press_ctrl_c(patch, lambda event: event["event"] == "status")
        ended = kilotune("evaluate", base, "-d", data)
    refused(ended, 130, "interrupted.")
    assert "again" not in ended.err
    assert result(kilotune(*lora, tmp_path / "cut").json) == result(whole)


# -- deployed ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def port():
    """A port that is taken for the test's duration; nobody answers there."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_a_taken_port_is_one_line(settings, tmp_path, port):
    assert kilotune("server", "init", tmp_path / "keys", "-c", "ada", "--port", port).code == 0
    command = ("server", "run", "kilotune", *settings, "--keys", tmp_path / "keys", "-o", tmp_path / "run")
    refused(kilotune(*command), 1, f"port {port} on 127.0.0.1 is taken")


def test_a_server_that_does_not_answer_is_one_line(settings, data, tmp_path, port):
    assert kilotune("server", "init", tmp_path / "keys", "-c", "ada", "--port", port).code == 0
    client = ("client", tmp_path / "keys" / "ada.join", "-d", data, *settings, "-o", tmp_path / "run", "--wait", "0")
    refused(kilotune(*client), 1, f"server 127.0.0.1:{port} did not answer within 0 s", "Start it, check the address")


def test_keys_and_join_files_are_checked_first(settings, data, tmp_path):
    """Kills: minutes of loading before a misspelt file name is found."""
    client = ("-d", data, *settings, "-o", tmp_path / "run")
    refused(kilotune("client", tmp_path / "x.join", *client), 1, "x.join: cannot read the join file")
    (tmp_path / "x.join").write_text("not mine")
    refused(kilotune("client", tmp_path / "x.join", *client), 1, "x.join: cannot use it", "Ask the server's owner")
    (tmp_path / "x.join").write_text('{"format": "kilotune-join-2"}')
    refused(kilotune("client", tmp_path / "x.join", *client), 1, "the field 'server' is missing")
    ended = kilotune("server", "run", *settings, "--keys", tmp_path, "-o", tmp_path / "run")
    refused(ended, 1, f"{tmp_path}: no server keys here", "kilotune server init")
    refused(kilotune("server", "init", tmp_path / "keys", "-c", "a/b"), 1, "client name: got 'a/b'")
    assert not (tmp_path / "run").exists()


# -- tracebacks -------------------------------------------------------------------------------------------------------


def test_debug_shows_where_an_error_comes_from():
    with pytest.raises(KilotuneError, match="kilotun"):
        kilotune("--debug", "federate", "kilotun")


def test_a_bug_keeps_its_traceback(monkeypatch):
    """Kills: a handler that hides what nobody foresaw behind one friendly line."""
    from kilotune.engine.operations import doctor

    monkeypatch.setattr(doctor, "examine", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kilotune("doctor")
