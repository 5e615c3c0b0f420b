"""The display's plain mode line by line; the live mode through a terminal that is a string."""

import io
import subprocess
import sys

import pytest

from kilotune.cli.display import LAST_ROWS, PROGRESS_EVERY_S, SAME_LINES, Display, clean


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def round_event(number, loss=1.5, seconds=2.0):
    counts = {"clients": 2, "asked": 4, "up_bytes": 8400, "down_bytes": 12_000}
    return {"event": "round", "round": number, "loss": loss, "seconds": seconds, "head": "ab", **counts}


def figures(loss, match):
    return {"loss": loss, "perplexity": 1.0, "exact_match": match, "rouge_l": None, "num_examples": 5}


def shown(events, total=4, unit="round", clock=None, **options):
    file = io.StringIO()
    with Display(total, unit, file=file, clock=clock or Clock(), **options) as emit:
        for event in events:
            emit(event)
    return file.getvalue().splitlines()


def test_plain_mode_says_each_event_in_one_line():
    """Kills: bytes of all clients shown as one client's; percent as fraction; events without a line."""
    events = [
        {"event": "status", "text": "loading base tiny"},
        {"event": "clients", "rows": {"a": 10, "b": 1200}},
        {"event": "warning", "text": "defences.enabled: got false:\nevery client is believed"},
        {"event": "client", "client": "a", "status": "joined", "num_examples": 10},
        {"event": "client", "client": "b", "status": "refused", "why": "follows recipe x,\nnot y"},
        {"event": "truncated", "who": "a", "rows": 10, "cut": 3},
        {"event": "evaluation", "round": 0, "overall": figures(4.0, None)},
        {"event": "client", "round": 1, "client": "a", "status": "ok", "up_bytes": 4200},
        {"event": "client", "round": 1, "client": "c", "status": "missing"},
        {"event": "client", "round": 1, "client": "d", "status": "error", "why": "cut payload"},
        round_event(1),
        {"event": "rejected", "round": 2, "why": "the loss rose from 1.000 to 9.000"},
        {"event": "evaluation", "round": 4, "overall": figures(1.2341, 0.41)},
        {"event": "page", "text": "live page at http://127.0.0.1:9464/"},
        {"event": "stopping", "why": "SIGTERM"},
        {"event": "stopped", "round": 4, "why": "no better loss"},
        {"event": "end", "digest": "ab"},
    ]
    assert shown(events) == [
        "loading base tiny",
        "2 clients with 1,210 training rows, 10 to 1,200 each",
        "warning: defences.enabled: got false: every client is believed",
        "client a joined",
        "client b refused: follows recipe x, not y",
        "a: 3 of 10 rows are longer than data.max_length and were cut",
        "before training: loss 4.000",
        "round 1: client c no answer",
        "round 1: client d failed: cut payload",
        "round 1/4: 2 of 4 clients, loss 1.500, 4.2 kB up and 3.0 kB down per client, 2.0 s",
        "round 2 changes nothing: the loss rose from 1.000 to 9.000",
        "round 4: loss 1.234, exact match 41 %",
        "live page at http://127.0.0.1:9464/",
        "SIGTERM: stopping after this round; once more to stop at once",
        "stopped early: no better loss",
    ]


def test_quiet_shows_nothing():
    """Kills: output that a script did not ask for."""
    assert shown([{"event": "status", "text": "x"}, round_event(1)], quiet=True) == []


def test_progress_in_a_log_is_rare():
    """Kills: a log with a line per step."""
    clock, file = Clock(), io.StringIO()
    emit = Display(3, "round", file=file, clock=clock)
    spacing = PROGRESS_EVERY_S / 5
    for index in range(20):
        emit({"event": "progress", "what": "evaluating", "done": index, "total": 20})
        clock.now += spacing
    assert file.getvalue().splitlines() == [f"evaluating {index}/20" for index in (0, 5, 10, 15)]


def test_steps_in_a_log_are_rare_but_the_last_one_is_shown():
    """Kills: thousands of lines; a log that ends before the last step."""
    events = [{"event": "step", "step": n, "loss": 2.0 / n, "tokens": 50, "seconds": 0.1} for n in range(1, 101)]
    assert shown(events, total=100, unit="step") == ["step 1/100: loss 2.000", "step 100/100: loss 0.020"]


def test_time_left_is_the_pace_of_the_last_rounds_times_what_is_missing():
    """Kills: a pace that counts rounds done before a resume, or forgets the time between rounds."""
    clock, file = Clock(), io.StringIO()
    emit = Display(20, "round", file=file, clock=clock)
    for number in (11, 12, 13):
        emit(round_event(number, seconds=5.0))
        clock.now += 30.0
    assert file.getvalue().splitlines()[-1].endswith(", 3 min 30 s left")  # 7 rounds of 30 s


def test_a_step_run_that_reports_rounds_still_counts_steps():
    """Kills: a bar that ends at a fifth, because each round of a local run over a basis holds several steps."""
    display = Display(20, "step", file=io.StringIO(), clock=Clock())
    display({"event": "progress", "what": "local: round 2 step 3/5 loss 1.000"})
    assert display._done == 8
    display(round_event(2))
    assert display._done == 10


def test_many_equal_client_events_are_summed_up():
    """Kills: ten thousand lines when ten thousand clients join."""
    events = [{"event": "client", "client": f"c{n}", "status": "joined"} for n in range(1000)]
    lines = shown([*events, round_event(1)])
    assert len(lines) == SAME_LINES + 2
    assert lines[SAME_LINES] == f"… and {1000 - SAME_LINES:,} more: joined"


def test_names_from_elsewhere_cannot_steer_the_terminal():
    """Kills: escape codes or line breaks of a client's name reaching the screen."""
    assert clean("a\x1b[2Jb\nc\u202ed") == "a\N{REPLACEMENT CHARACTER}[2Jb c\N{REPLACEMENT CHARACTER}d"
    lines = shown([{"event": "client", "client": "x\x1b]0;hi\x07", "status": "joined"}])
    assert "\x1b" not in lines[0] and "\x07" not in lines[0]


def test_unknown_events_are_passed_over():
    """Kills: a new event of the engine ending a run."""
    assert shown([{"event": "new_kind", "x": 1}]) == []


def test_a_terminal_shows_lines_the_last_rounds_and_the_bar(monkeypatch):
    """Kills: markup of a reason eaten by rich; a table that grows without end; no bar."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    file = Terminal()
    with Display(9, "round", file=file) as emit:
        emit({"event": "client", "client": "b", "status": "refused", "why": "recipe [bold]x[/bold]"})
        for number in range(1, LAST_ROWS + 3):
            emit(round_event(number, loss=number + 0.25))
        emit({"event": "evaluation", "round": 8, "overall": figures(0.5, 0.4)})
    text = file.getvalue()
    assert "client b refused: recipe [bold]x[/bold]" in text
    assert "round 8: loss 0.500, exact match 40 %" in text
    last = text[text.rindex("down/client") :]
    assert f"{LAST_ROWS + 2}.250" in last and "3.250" in last and "2.250" not in last
    assert "round 8/9" in last


@pytest.mark.parametrize("event", [{"event": "status", "text": "replaying 3 rounds"}])
def test_a_command_without_a_known_end_leaves_a_clean_terminal(monkeypatch, event):
    """Kills: a frozen bar after the command ended."""
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    with Display(None, "", file=file) as emit:
        emit(event)
        assert emit._render().renderables
    assert not emit._render().renderables


def test_the_display_costs_no_import_of_rich():
    """Kills: every command waiting for a terminal library it may not need."""
    code = "import sys, kilotune.cli.display; sys.exit(bool({'rich', 'torch', 'typer'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
