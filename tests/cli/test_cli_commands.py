"""Every command once, through the same door as a user: what it prints, what it leaves, and that these agree."""

import json
import stat

import click
import pytest
import typer
from command_line import federated, kilotune, small

from kilotune import __version__
from kilotune.cli.main import app
from kilotune.engine.composing.compose import shipped

LOSS_ONLY = ("--max-new-tokens", 0, "--max-length", 64, "--format", "json")
FIGURES = {"loss", "perplexity", "exact_match", "rouge_l", "num_examples"}


@pytest.fixture(autouse=True)
def nothing_beside_stdout(capfd):
    """Kills: a library or the product writing to the process' stdout past Python's stream."""
    yield
    assert capfd.readouterr().out == ""


@pytest.fixture(scope="module")
def run(base, data, tmp_path_factory):
    """A finished federation: its folder, and what the command printed."""
    folder = tmp_path_factory.mktemp("run") / "out"
    ended = kilotune("federate", *federated(base, data), "-o", folder, "--format", "json")
    return folder, ended


@pytest.fixture(scope="module")
def lora(base, data, tmp_path_factory):
    """A finished LoRA run of one machine."""
    folder = tmp_path_factory.mktemp("lora") / "out"
    settings = small(base, data, "steps=3", "evaluation.generate=false")
    return folder, kilotune("tune", "local_lora", *settings, "-o", folder, "--format", "json").json


@pytest.fixture(scope="module")
def applied(base, run, tmp_path_factory):
    """The run's seed file, applied to the base: the exported folder and the result."""
    folder = tmp_path_factory.mktemp("applied") / "model"
    command = ("apply", run[0] / "final.seed", "--base", base, "-o", folder, "--format", "json")
    return folder, kilotune(*command).json


# -- training ---------------------------------------------------------------------------------------------------------


def test_federate_prints_one_object_with_the_keys_others_script(run):
    """Kills: a key renamed; progress on stdout; a summary.json that differs from what was printed."""
    folder, ended = run
    summary = ended.json
    assert summary["rounds"] == 2
    assert summary["clients"] == 3
    assert len(summary["digest"]) == 64
    assert 0 < summary["payload_up_bytes_per_client_round"] < 200
    assert 0 < summary["payload_down_bytes_per_client_round"] < 400
    assert summary["peak_rss_bytes"] > 1 << 20
    assert summary["seconds"] > 0
    for when in ("before", "after"):
        assert set(summary["eval"][when]) >= FIGURES
        assert summary["eval"][when]["num_examples"] == 9
        assert summary["eval"][when]["exact_match"] is not None
    assert summary["eval"]["after"]["loss"] < summary["eval"]["before"]["loss"]
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert (folder / "report.html").stat().st_size > 1000


def test_progress_goes_to_stderr(run):
    err = run[1].err
    for words in ("loading base", "3 clients with 27 training rows", "round 2/2: 3 of 3 clients", "before training"):
        assert words in err


def test_the_same_command_again_gives_the_same_result(base, data, run):
    """A finished run is not trained further. Kills: bytes or quality of a run forgotten by a second call."""
    folder, first = run
    again = kilotune("federate", *federated(base, data), "-o", folder, "--format", "json").json
    measured = ("seconds", "peak_rss_bytes")
    assert {k: v for k, v in again.items() if k not in measured} == {
        k: v for k, v in first.json.items() if k not in measured
    }


def test_federate_tells_people_what_came_out(base, data, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    settings = federated(base, data, "rounds=1", "evaluation.generate=false")
    ended = kilotune("federate", "kilotune", *settings, "-o", tmp_path / "run")
    assert ended.code == 0
    for words in ("held-out rows", "before", "after", "loss"):
        assert words in ended.out
    for words in ("payload per client and round:", "peak memory", str(tmp_path / "run" / "report.html")):
        assert words in ended.err


def test_tune_leaves_an_adapter(lora):
    folder, summary = lora
    assert summary["command"] == "tune"
    assert summary["steps"] == 3
    assert summary["eval"]["after"]["loss"] < summary["eval"]["before"]["loss"]
    assert (folder / "adapter" / "adapter_model.safetensors").exists()


def test_tune_through_a_basis_leaves_a_seed_file_that_is_the_run(base, data, tmp_path):
    """Kills: a local run whose seed file is of another state."""
    settings = small(base, data, "basis.size=64", "steps=4", "local_steps=2", "evaluation.generate=false")
    command = ("tune", "local_subspace", *settings, "-o", tmp_path / "run", "--format", "json")
    summary = kilotune(*command).json
    assert summary["command"] == "tune"
    assert summary["steps"] == 4
    replayed = kilotune("replay", tmp_path / "run" / "final.seed", "--format", "json").json
    assert replayed["digest"] == summary["digest"]
    assert replayed["rounds"] == 2


# -- a finished run ---------------------------------------------------------------------------------------------------


def test_evaluate_gives_the_figures_of_the_run_for_folder_seed_file_and_export(base, data, run, applied):
    """Kills: a target opened as something else; a merged model that is not the run; other rows or template."""
    folder, ended = run
    summary = ended.json
    wanted = {"before": base, "after": folder}
    for when, target in wanted.items():
        result = kilotune("evaluate", target, "--data", data, *LOSS_ONLY).json
        assert set(result) >= {"model", "data", "split", "overall", "clients", "num_truncated"}
        assert result["overall"]["loss"] == pytest.approx(summary["eval"][when]["loss"], rel=1e-6)
        assert result["overall"]["num_examples"] == 9
    for target in (folder / "final.seed", applied[0]):
        result = kilotune("evaluate", target, "--data", data, *LOSS_ONLY).json
        assert result["overall"]["loss"] == pytest.approx(summary["eval"]["after"]["loss"], rel=1e-6)


def test_evaluate_counts_every_client_limits_and_splits(base, data):
    """Kills: a limit that takes one client's rows only; `split` ignored; answers without figures."""
    options = ("--max-length", 64, "--max-new-tokens", 2, "--format", "json")
    result = kilotune("evaluate", base, "-d", data, "--limit", 6, *options).json
    assert {name: figures["num_examples"] for name, figures in result["clients"].items()} == {
        "ada": 2,
        "bob": 2,
        "cyd": 2,
    }
    assert 0 <= result["overall"]["rouge_l"] <= 1
    counts = [
        kilotune("evaluate", base, "-d", data, "--split", split, *LOSS_ONLY).json["overall"]["num_examples"]
        for split in ("test", "train", "all")
    ]
    assert counts == [9, 27, 36]


def test_evaluate_for_people_shows_all_and_each_client(base, data, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    ended = kilotune("evaluate", base, "-d", data, "--max-new-tokens", 0, "--max-length", 64)
    assert ended.code == 0
    for word in ("perplexity", "all", "ada", "bob", "cyd"):
        assert word in ended.out


def test_replay_verifies_run_and_seed_file(run):
    """Kills: a digest that is printed but not rebuilt."""
    folder, ended = run
    for source in (folder, folder / "final.seed"):
        result = kilotune("replay", source, "--format", "json").json
        assert result["digest"] == ended.json["digest"]
        assert result["rounds"] == 2
        assert result["verified"] is True
    assert f"verified 2 rounds; weights {ended.json['digest']}" in kilotune("replay", folder).out


def test_apply_and_merge_write_the_tuned_model(run, applied, tmp_path):
    folder, ended = run
    target, result = applied
    assert result == {"folder": str(target), "to": "hf", "digest": ended.json["digest"], "checked": True}
    merged = tmp_path / "merged"
    assert kilotune("merge", folder, "-o", merged, "--format", "json").json["digest"] == ended.json["digest"]
    for file in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (merged / file).read_bytes() == (target / file).read_bytes()
    assert (merged / "model.safetensors").read_bytes() == (target / "model.safetensors").read_bytes()


def test_an_adapter_is_exported_alone_or_merged(base, data, lora, tmp_path):
    """Kills: a merge without the adapter; an adapter folder without its configuration."""
    folder, summary = lora
    command = ("export", folder, "--to", "peft", "-o", tmp_path / "adapter", "--format", "json")
    result = kilotune(*command).json
    assert result["to"] == "peft"
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 8
    assert kilotune("export", folder, "--to", "hf", "-o", tmp_path / "whole", "--format", "json").json["to"] == "hf"
    loss = kilotune("evaluate", tmp_path / "whole", "-d", data, *LOSS_ONLY).json["overall"]["loss"]
    assert loss == pytest.approx(summary["eval"]["after"]["loss"], rel=1e-4)


def test_chat_compares_the_run_with_its_base(base, run, applied):
    """Kills: both answers from one model; a base that the run has changed in place."""
    options = ("--prompt", "ada on 0", "--max-new-tokens", 12, "--format", "json")
    answers = {target: kilotune("chat", target, *options).json["answer"] for target in (base, applied[0])}
    result = kilotune("chat", run[0], "--compare", *options).json
    assert result == {"prompt": "ada on 0", "answer": answers[applied[0]], "base_answer": answers[base]}
    ended = kilotune("chat", run[0], "--compare", "-p", "ada on 0", "--max-new-tokens", 3)
    assert ended.code == 0
    assert "tuned" in ended.out


# -- looking and predicting -------------------------------------------------------------------------------------------


def test_plan_predicts_the_bytes_of_the_run(base, data, run):
    """Kills: a formula that left the codec behind; a plan without a time although it probed."""
    summary = run[1].json
    for flag in ("--no-probe", "--probe"):
        predicted = kilotune("plan", "kilotune", *federated(base, data), flag, "--format", "json").json
        for way in ("up", "down"):
            key = f"payload_{way}_bytes_per_client_round"
            assert predicted[key] == pytest.approx(summary[key], rel=0.05), key
        assert predicted["clients"] == 3
        assert predicted["trainable"] == 64
        assert predicted["peak_rss_bytes"] > 1 << 20
        assert (predicted["seconds"] is None) == (flag == "--no-probe")


def test_plan_of_a_local_recipe_has_no_payload(base, data, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    command = ("plan", "local_lora", *small(base, data, "steps=3"), "--no-probe")
    assert "payload_up_bytes_per_client_round" not in kilotune(*command, "--format", "json").json
    text = kilotune(*command).out
    assert "peak memory" in text
    assert "payload" not in text


def test_methods_names_a_source_for_everything():
    """Kills: a method file without `Source:`."""
    found = kilotune("methods", "--format", "json").json
    assert len(found) > 20
    for entry in found:
        assert {"kind", "name", "paper"} <= set(entry)
        assert len(entry["paper"]) > 10, entry
    codecs = kilotune("methods", "--kind", "codec", "--format", "json").json
    assert codecs == [entry for entry in found if entry["kind"] == "codec"]
    assert kilotune("methods", "--papers").out.startswith("# Papers")


def test_recipes_are_listed_shown_and_checked(base, data, run, tmp_path):
    """Kills: a shown recipe that is not the one that ran."""
    listed = kilotune("recipe", "list", "--format", "json").json["recipes"]
    assert sorted(listed) == shipped()
    assert all(listed.values())
    shown = kilotune("recipe", "show", "kilotune", *federated(base, data))
    (tmp_path / "own.yaml").write_text(shown.out)
    checked = kilotune("recipe", "check", tmp_path / "own.yaml", "--format", "json").json
    assert checked == {"recipe_id": run[1].json["recipe_id"], "mode": "federate"}
    as_json = kilotune("recipe", "show", "kilotune", *federated(base, data), "--format", "json").json
    assert as_json["basis"]["size"] == 64
    assert kilotune("recipe", "check", "local_lora", "--format", "json").json["mode"] == "tune"


def test_data_show_marks_the_answer(base, data, monkeypatch):
    """Kills: loss on the question; marks at the wrong place."""
    monkeypatch.setenv("COLUMNS", "200")
    shown = kilotune("data", "show", data, "--base", base, "--limit", 2, "--format", "json").json
    assert shown["num_rows"] == 36
    assert shown["splits"] == {"train": 27, "test": 9}
    assert shown["clients"] == {"ada": 12, "bob": 12, "cyd": 12}
    assert 0 < shown["label_tokens"] < shown["tokens"]
    assert len(shown["rows"]) == 2
    marked = "".join(s["text"] for s in shown["rows"][0]["segments"] if s["loss"])
    unmarked = "".join(s["text"] for s in shown["rows"][0]["segments"] if not s["loss"])
    assert marked.startswith("on0")
    assert "ada on 0" in unmarked
    text = kilotune("data", "show", data, "--base", base, "--limit", 1)
    assert "ada on 0" in text.out
    assert "27 train, 9 test; 3 clients" in text.err


def test_data_households_writes_rows_that_can_be_used(tmp_path):
    file = tmp_path / "new folder" / "rows.jsonl"
    result = kilotune("data", "households", "-o", file, "--format", "json").json
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert result == {"file": str(file), "rows": len(rows)}
    assert len({row["client"] for row in rows}) == 6
    assert {row["split"] for row in rows} >= {"train", "test"}


def test_doctor_checks_this_machine():
    """Kills: a problem that is reported with exit code 0."""
    ended = kilotune("doctor", "--format", "json")
    result = json.loads(ended.out)
    assert ended.code == (0 if result["ok"] else 1)
    names = [check["check"] for check in result["checks"]]
    assert {"kilotune", "torch", "memory", "disk", "cache", "embedded model"} <= set(names)
    assert all(check["found"] for check in result["checks"])


def test_server_init_writes_one_secret_file_per_client(tmp_path):
    """Kills: keys that others on this machine can read; a second call that forgets or replaces clients."""
    folder = tmp_path / "keys"
    first = kilotune("server", "init", folder, "-c", "ada", "-c", "bob", "--port", 9443, "--format", "json").json
    assert first["address"] == "127.0.0.1:9443"
    secret = (folder / "ada.join").read_bytes()
    second = kilotune("server", "init", folder, "-c", "cyd", "--port", 9443, "--format", "json").json
    assert sorted(second["join_files"]) == ["ada", "bob", "cyd"]
    assert (folder / "ada.join").read_bytes() == secret
    for file in second["join_files"].values():
        assert stat.S_IMODE((folder / file).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


# -- the command line itself ------------------------------------------------------------------------------------------


def commands(command, path=()):
    """(words, command) of every command that does something."""
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from commands(inner, (*path, name))
    else:
        yield path, command


ALL = dict(commands(typer.main.get_command(app)))


def test_the_version():
    ended = kilotune("--version")
    assert (ended.code, ended.out) == (0, f"kilotune {__version__}\n")


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_command_explains_itself_and_takes_format(words, monkeypatch):
    """Kills: help of positional arguments lost between typer and click; a command without --format."""
    monkeypatch.setenv("COLUMNS", "200")
    ended = kilotune(*words, "--help")
    assert ended.code == 0
    assert "--format" in ended.out
    assert ALL[words].help.splitlines()[0][:60] in ended.out
    for param in ALL[words].params:
        assert param.help or param.name == "help", param.name
        assert (param.help or "")[:40] in ended.out
