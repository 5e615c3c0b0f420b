"""Structured logs line by line; and signals that a run acts on between two rounds."""

import io
import json
import logging
import signal
import warnings
from datetime import datetime

import pytest

from kilotune.engine.interrupt import StoppedError, asked_to_stop
from kilotune.engine.operations.logs import facts_of, json_lines

SECRET = "the patient in room 4"


def logged(*events):
    file = io.StringIO()
    with json_lines(file) as emit:
        for event in events:
            emit(event)
    return [json.loads(line, parse_constant=pytest.fail) for line in file.getvalue().splitlines()]


def test_each_event_is_one_line_with_time_level_event_and_facts():
    """Kills: a line that is no JSON; NaN in it; a time without a zone; an error that looks like information."""
    counts = {"round": 3, "clients": 2, "loss": float("nan"), "head": "ab12", "seconds": 1.5}
    told = {"client": "bob", "round": 3}
    lines = logged(
        {"event": "round", **counts},
        {"event": "client", **told, "status": "error", "why": "cut\nin two"},
        {"event": "client", **told, "status": "ok", "up_bytes": 4249},
        {"event": "failed", "why": "too few"},
        {"event": "progress", "what": "step 1"},
    )
    times = [datetime.fromisoformat(line.pop("time")) for line in lines]
    assert all(time.utcoffset().total_seconds() == 0 for time in times)
    assert lines == [
        {"level": "info", "event": "round", **counts, "loss": None},
        {"level": "warning", "event": "client", **told, "status": "error", "why": "cut in two"},
        {"level": "info", "event": "client", **told, "status": "ok", "up_bytes": 4249},
        {"level": "error", "event": "failed", "why": "too few"},
    ]


def test_no_private_text_and_no_loss_of_one_client_is_logged():
    """Kills: a log of everything an event happens to carry."""
    event = {"event": "client", "client": "bob", "status": "ok", "loss": 7.25, "loss_first": 7.25, "round": 1}
    (line,) = logged(event | {"row": SECRET, "answers": [SECRET], "labels": {"x": SECRET}, "output": SECRET})
    assert SECRET not in json.dumps(line)
    assert 7.25 not in line.values()
    (line,) = logged({"event": "unheard_of", SECRET: {SECRET: 1}, "prompt": SECRET})
    assert SECRET not in json.dumps(line)


def test_an_evaluation_tells_its_overall_figures_and_no_clients():
    overall = {"loss": 1.5, "exact_match": None, "num_examples": 7}
    event = {"event": "evaluation", "round": 2, "overall": overall, "clients": {"bob": {"loss": 9.5}}}
    assert facts_of(event) == {"round": 2, "loss": 1.5, "num_examples": 7}


def test_what_libraries_log_or_warn_of_is_json_too_and_all_is_as_before_afterwards():
    """Kills: a plain line among the JSON ones; handlers that stay."""
    before = list(logging.getLogger().handlers)
    file = io.StringIO()
    with json_lines(file):
        logging.getLogger("some.library").error("broken\npipe")
        chatty = logging.getLogger("chatty")
        chatty.setLevel(logging.DEBUG)
        chatty.info("a request with its content")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old", UserWarning, stacklevel=1)
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [(line["level"], line["event"]) for line in lines] == [("error", "message"), ("warning", "message")]
    assert (lines[0]["logger"], lines[0]["text"]) == ("some.library", "broken pipe")
    assert logging.getLogger().handlers == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_is_announced_and_ends_the_run_after_the_round(number, code):
    """Kills: a round that is thrown away; a run that ends while events of the round are still to come."""
    events = []
    before = signal.getsignal(number)
    with asked_to_stop(events.append) as stop:
        emit = stop.between_rounds(events.append)
        emit({"event": "round", "round": 1})
        signal.raise_signal(number)
        assert stop.asked.wait(20)
        emit({"event": "client", "client": "bob"})
        with pytest.raises(StoppedError, match="after round 2") as raised:
            emit({"event": "round", "round": 2})
    assert raised.value.exit_code == code
    assert events == [
        {"event": "round", "round": 1},
        {"event": "stopping", "why": number.name},
        {"event": "client", "client": "bob"},
        {"event": "round", "round": 2},
    ]
    assert signal.getsignal(number) == before


def test_a_second_signal_interrupts_at_once():
    with asked_to_stop(lambda event: None), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)


def test_a_run_that_nobody_stops_ends_as_ever():
    """Kills: a thread that waits for a signal for ever; an end that looks like a stop."""
    events = []
    with asked_to_stop(events.append) as stop:
        stop.between_rounds(events.append)({"event": "round", "round": 1})
    assert events == [{"event": "round", "round": 1}]
    assert not stop.requested
