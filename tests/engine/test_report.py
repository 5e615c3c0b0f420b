"""The report against the events it was made from."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import yaml

from kilotune.core.errors import RunError
from kilotune.core.units import human_bytes, human_seconds
from kilotune.engine.reporting._history import History
from kilotune.engine.reporting._svg import line_chart, nice_step, ticks
from kilotune.engine.reporting.report import write_report
from kilotune.engine.runfolder import RECIPE, RunFolder

VOID = {"meta", "br", "hr", "img", "input", "link"}
EVIL = '<script>alert("1")</script>'


class Page(HTMLParser):
    """Checks that tags nest, and collects texts, tags, attributes and the cells of each table row."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts, self.rows = [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.texts.append(data)
        if self.rows and self.open[-1:] in (["td"], ["th"]):
            self.rows[-1].append(data)

    def row(self, name):
        """Cells of the last row that starts with `name`."""
        return [row for row in self.rows if row[:1] == [name]][-1]


def figures(loss, match, rows=20):
    return {"loss": loss, "perplexity": 2.0, "exact_match": match, "rouge_l": match, "num_examples": rows}


def round_event(number, up, down, loss):
    return {
        "event": "round",
        "round": number,
        "clients": 2,
        "asked": 3,
        "loss": loss,
        "up_bytes": up,
        "down_bytes": down,
        "seconds": 1.5,
        "head": "ab",
    }


def answer(number, client, up, loss=1.0):
    common = {"event": "client", "round": number, "client": client}
    return {**common, "status": "ok", "up_bytes": up, "loss": loss, "seconds": 2.0, "num_examples": 40}


ROUNDS = [(1, 8001, 0, 3.125), (2, 8003, 8017, 2.25), (3, 8009, 8039, 1.75)]


def folder(path, events, summary=None, **recipe):
    run = RunFolder(path)
    path.mkdir()
    content = {"title": "a & b <i>", "source": "nobody", "base": "tiny", "rounds": 3, "steps": None, **recipe}
    (path / RECIPE).write_text(yaml.safe_dump(content))
    for event in events:
        run.record(event)
    if summary is not None:
        run.write_summary(summary)
    return run


def federation_events():
    events = [{"event": "clients", "rows": {"anna": 40, EVIL: 41}}]
    events += [{"event": "client", "client": "carl", "status": "refused", "why": "follows recipe <77>"}]
    per_client = {"anna": figures(5.0, 0.0), EVIL: figures(4.0, 0.0)}
    events += [{"event": "evaluation", "round": 0, "overall": figures(4.5, 0.0), "clients": per_client}]
    for number, up, down, loss in ROUNDS:
        events += [answer(number, "anna", up - 4000, loss), answer(number, EVIL, 4000)]
        events += [{"event": "client", "round": number, "client": "dora", "status": "missing"}]
        events += [round_event(number, up, down, loss)]
    per_client = {"anna": figures(1.0, 0.5), EVIL: figures(2.0, 0.25)}
    events += [{"event": "evaluation", "round": 3, "overall": figures(1.5, 0.375), "clients": per_client}]
    return [*events, {"event": "end", "digest": "d1"}]


def federation_summary():
    return {
        "command": "federate",
        "rounds": 3,
        "clients": 2,
        "digest": "feed" * 16,
        "recipe_id": "1234567890abcdef",
        "base": "tiny",
        "base_digest": "beef" * 16,
        "payload_up_bytes_per_client_round": 4002.2,
        "payload_down_bytes_per_client_round": 2676.0,
        "peak_rss_bytes": 1_234_000_000,
        "seconds": 125.0,
        "eval": {"before": figures(4.5, 0.0), "after": figures(1.5, 0.375)},
        "client_digests": {"anna": "feed" * 16, "dora": "0"},
        "outputs": {"seed_file": "final.seed", "seed_file_bytes": 37_210},
        "socket": {"anna": {"message_sent": 12_345, "idle_sent": 67}, EVIL: {"message_sent": 5}},
    }


@pytest.fixture
def finished(tmp_path):
    run = folder(tmp_path / "demo", federation_events(), federation_summary())
    (run.path / "ledger.jsonl").write_text("{}\n")
    return write_report(run).read_text()


def test_headline_numbers_are_those_of_the_summary(finished):
    """Kills: numbers recomputed from something else, before and after swapped, wrong units."""
    shown = Page(finished).texts
    for text in ("4.500 → 1.500", "0.0 → 37.5 %", "4.0 kB", "2.7 kB", "37.2 kB", "1.2 GB", "2 min 05 s"):
        assert text in shown


def test_every_round_stands_in_the_table_with_its_bytes_and_their_sum(finished):
    """Kills: bytes of one direction only in the running sum; clients and asked swapped."""
    page, total = Page(finished), 0
    for number, up, down, loss in ROUNDS:
        total += up + down
        expected = [str(number), "2 of 3", f"{loss:.3f}", f"{up:,}", f"{down:,}", f"{total:,}", "1.50"]
        assert expected in page.rows
    assert page.row("3")[-1] == f"{total:,}"  # the evaluation after round 3 stands at the same sum


def test_the_clients_table_sums_what_each_client_did(finished):
    """Kills: clients' bytes mixed up; a refused or missing client left out; before and after swapped."""
    page = Page(finished)
    up = sum(up - 4000 for _, up, _, _ in ROUNDS)
    assert page.row("anna") != page.row(EVIL)
    clients = {row[0]: row for row in page.rows if len(row) == 11 and row[0] != "client"}
    loss = f"{ROUNDS[-1][3]:.3f}"
    assert clients["anna"] == ["anna", "40", "3", loss, "5.000", "1.000", "0.0 %", "50.0 %", f"{up:,}", "6.0", "0"]
    assert clients["dora"][-1] == "3" and clients["dora"][2] == "0"
    assert clients["carl"][-1] == "1"
    assert sum(int(row[8].replace(",", "")) for row in clients.values()) == sum(up for _, up, _, _ in ROUNDS)


def test_what_others_named_is_text_and_never_markup(finished):
    """Kills: a client's name, an error or a recipe's title that ends up as a tag of the page."""
    page = Page(finished)
    assert "script" not in page.tags and "i" not in page.tags and "77" not in page.tags
    assert EVIL in page.texts and "a & b <i>" in page.texts and "follows recipe <77>" in page.texts


def test_the_page_loads_nothing(finished):
    """Kills: a font, image, script or style sheet from elsewhere."""
    page = Page(finished)
    assert not {"script", "link", "img", "iframe", "object", "use"} & set(page.tags)
    assert not [a for a in page.attributes if a[1] in ("src", "href", "srcset", "data") or "url(" in (a[2] or "")]
    assert "http://" not in finished and "https://" not in finished and "@import" not in finished
    assert "url(" not in finished


def test_charts_have_titles_and_descriptions_with_ids_of_their_own(finished):
    """Kills: charts a screen reader cannot name; two charts that share an id."""
    page = Page(finished)
    count = page.tags.count("svg")
    assert count == 6
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) == 2 * count
    named = " ".join(value for _, name, value in page.attributes if name == "aria-labelledby").split()
    assert sorted(named) == sorted(ids)


def test_the_socket_table_shows_whatever_was_counted(finished):
    """Kills: fixed column names; a crash on a client without one of the counts."""
    page = Page(finished)
    assert ["anna", "67", "12,345"] in page.rows or ["anna", "12,345", "67"] in page.rows
    assert any(row[0] == EVIL and "–" in row and "5" in row for row in page.rows)


def test_only_clients_with_this_digest_are_said_to_hold_equal_weights(finished):
    """Kills: listing every client that answered."""
    shown = Page(finished).texts
    assert shown[shown.index("Clients with equal weights") + 1] == "anna"


def test_the_commands_name_the_run_and_its_base(finished):
    """Kills: commands that cannot be copied; the owner's home folder in a file that is passed on."""
    commands = next(text for text in Page(finished).texts if "kilotune chat" in text)
    assert "kilotune replay demo\n" in commands
    assert "kilotune apply --base tiny demo/final.seed -o DIR" in commands
    assert "kilotune chat demo --compare" in commands


def test_the_same_folder_gives_the_same_bytes(tmp_path):
    """Kills: counters or times of the writing process in the page."""
    run = folder(tmp_path / "demo", federation_events(), federation_summary())
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_a_redone_round_counts_once_and_the_last_one_counts():
    """Kills: bytes, rounds and losses counted twice after a crash."""
    events = federation_events()
    redone = [answer(3, "anna", 100, 0.5), answer(3, EVIL, 11), round_event(3, 111, 8039, 0.5)]
    history = History([*events, *redone])
    assert [r["round"] for r in history.rounds] == [1, 2, 3]
    assert history.rounds[-1]["loss"] == 0.5
    assert history.payload_until(3) == sum(u + d for n, u, d, _ in ROUNDS if n < 3) + 111 + 8039
    parts = history.parts()
    assert parts["anna"].rounds == 3 and parts["anna"].up_bytes == 4001 + 4003 + 100
    assert sum(p.up_bytes for p in parts.values()) == sum(r["up_bytes"] for r in history.rounds)


def test_answers_of_a_round_that_was_not_committed_do_not_count():
    """Kills: a client's bytes that no round event contains."""
    history = History([*federation_events(), answer(4, "anna", 999)])
    assert history.parts()["anna"].rounds == 3


def test_a_committed_round_without_an_event_is_named(tmp_path):
    """Kills: a gap in the curve that looks like data."""
    events = [e for e in federation_events() if not (e["event"] == "round" and e["round"] == 2)]
    html = write_report(folder(tmp_path / "gap", events, federation_summary())).read_text()
    assert "lost when a process ended: 2." in html


def test_an_unfinished_run_says_so_and_shows_what_is_known(tmp_path):
    """Kills: a report that needs the summary; a report that looks finished."""
    run = folder(tmp_path / "half", federation_events()[:9], None)
    (run.path / "ledger.jsonl").write_text(json.dumps({"base": "tiny", "base_digest": "beef", "recipe_id": "77aa"}))
    html = write_report(run).read_text()
    page = Page(html)
    assert "not finished: 1 of 3 rounds" in html
    assert "1 of 3" in page.texts and "77aa" in page.texts and "4.500" in page.texts
    assert "kilotune apply" not in html


def test_a_run_without_any_event_gives_a_page(tmp_path):
    """Kills: max() of nothing."""
    html = write_report(folder(tmp_path / "new", [], None)).read_text()
    Page(html)
    assert "not finished: 0 of 3 rounds" in html


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    """Kills: an empty report beside somebody's files."""
    with pytest.raises(RunError, match=r"recipe\.yaml"):
        write_report(RunFolder(tmp_path))


def step(number, loss):
    return {"event": "step", "step": number, "loss": loss, "tokens": 100, "seconds": 0.5}


def test_a_tune_run_shows_steps_and_no_bytes(tmp_path):
    """Kills: payload charts of a run that sent nothing; null exact match drawn as zero; redone steps counted twice."""
    unmeasured = {**figures(4.0, None), "rouge_l": None}
    events = [{"event": "evaluation", "step": 0, "overall": unmeasured, "clients": {}}]
    events += [step(n, 4.0 - n / 100) for n in range(1, 101)]
    events += [{"event": "resumed", "step": 98}, step(99, 0.5), step(100, 0.25)]
    events += [{"event": "evaluation", "step": 100, "overall": {**unmeasured, "loss": 3.0}, "clients": {}}]
    summary = {
        "command": "tune",
        "steps": 100,
        "rounds": 0,
        "digest": "aa",
        "seconds": 60.0,
        "eval": {"before": unmeasured, "after": {**unmeasured, "loss": 3.0}},
        "outputs": {"adapter": "adapter"},
    }
    html = write_report(folder(tmp_path / "tune", events, summary, rounds=None, steps=100)).read_text()
    page = Page(html)
    assert page.tags.count("svg") == 1
    assert "4.000 → 3.000" in page.texts and "0.50 s" in page.texts
    assert [row[1] for row in page.rows if row[0] == "99" and len(row) == 4] == ["0.500"]
    assert "payload" not in html.lower() and "Exact match" not in page.texts
    assert "--to peft" in html and "replay" not in html


def test_a_run_alone_over_a_basis_claims_no_traffic(tmp_path):
    """Kills: ledger bytes of one machine reported as bytes on a network."""
    events = [{"event": "clients", "rows": {"local": 40}}, answer(1, "local", 4000), round_event(1, 4000, 0, 2.0)]
    page = Page(write_report(folder(tmp_path / "alone", events, None)).read_text())
    assert not {"Up", "Payload of all rounds", "bytes up"} & set(page.texts)
    assert ["1", "2.000", "1.50"] in page.rows


def test_a_loss_that_is_not_finite_is_left_out(tmp_path):
    """Kills: 'nan' as a coordinate, which makes a browser drop the whole curve."""
    events = federation_events()
    events[2]["overall"]["loss"] = float("nan")
    events[6]["loss"] = float("inf")
    html = write_report(folder(tmp_path / "odd", events, None)).read_text()
    assert not re.search(r"\b(nan|inf)\b", html)


@pytest.mark.parametrize(("lo", "hi"), [(0, 0.0007), (0.31, 0.34), (0, 5.92), (-25.3, 25.1), (3, 3), (0, 1e9)])
def test_ticks_are_round_and_enclose_the_data(lo, hi):
    """Kills: ticks like 0.333; data outside of the frame."""
    marks = ticks(lo, hi)
    steps = {round((b - a) / nice_step(max(hi - lo, 1e-12), 5), 6) for a, b in pairwise(marks)}
    assert marks[0] <= lo + 1e-9 and marks[-1] >= hi - 1e-9 and 2 <= len(marks) <= 8
    assert len(steps) == 1


def test_a_chart_without_points_is_left_out():
    """Kills: an empty frame."""
    assert line_chart("t", [], "round", str) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (4154.2, "4.2 kB"), (99_960, "100 kB"), (999_960, "1.0 MB")],
)
def test_bytes_read_in_decimal_units(value, text):
    """Kills: 1024 for 1000; '1000 kB'."""
    assert human_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.42, "0.42 s"), (59.97, "1 min 00 s"), (125, "2 min 05 s"), (3599.7, "1 h 00 min"), (90_000, "1 d 1 h")],
)
def test_seconds_carry_into_the_next_unit(value, text):
    """Kills: '60 s', '60 min'."""
    assert human_seconds(value) == text
