"""The Prometheus text, read back by Prometheus' own parser."""

import pytest

from kilotune.engine.operations.prometheus import exposition
from kilotune.engine.operations.runview import RunView

parser = pytest.importorskip("prometheus_client.parser")

MACHINE = {"disk_free_bytes": 123_456_789.0, "peak_rss_bytes": 2.5e9}
ODD = 'a"b\\c{x="1"} 5'


def scraped(view, machine=MACHINE):
    """(name, labels) -> value, and name of the family -> its type."""
    families = list(parser.text_string_to_metric_families(exposition(view.snapshot(), machine, "1.2.3")))
    values = {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}
    return values, {f.name: f.type for f in families}, families


def full():
    view = RunView({}, 40, ("ada", ODD), {"budget": 8.0, "delta": 1e-5})
    for number in (1, 2):
        told = {"event": "client", "round": number, "client": "ada", "status": "ok"}
        view.fold({**told, "up_bytes": 4249, "seconds": 3.5, "peak_rss_bytes": 10**9, "time": 100.0 * number})
        view.fold({"event": "client", "client": ODD, "status": "error", "why": "sends numbers that are not finite"})
        counts = {"clients": 1, "asked": 2, "up_bytes": 4249, "down_bytes": 8377 * number}
        seconds = {"seconds": 4.0 + number, "loss": 1.25, "epsilon": 0.75 * number, "time": 100.0 * number}
        view.fold({"event": "round", "round": number, **counts, **seconds})
    overall = {"loss": 1.115, "exact_match": 0.25, "rouge_l": None}
    view.fold({"event": "evaluation", "round": 2, "overall": overall, "down_bytes": 10})
    return view


def test_every_sample_reads_back_as_what_the_view_holds():
    """Kills: labels that are not escaped; a counter named without _total; a number in a format of our own."""
    values, types, families = scraped(full())
    assert values[("kilotune_rounds_total", ())] == 2
    assert values[("kilotune_rounds_planned", ())] == 40
    assert (values[("kilotune_round_seconds_sum", ())], values[("kilotune_round_seconds_count", ())]) == (11.0, 2)
    assert values[("kilotune_bytes_total", (("direction", "up"),))] == 2 * 4249
    assert values[("kilotune_bytes_total", (("direction", "down"),))] == 3 * 8377 + 10
    assert values[("kilotune_client_up_bytes_total", (("client", "ada"),))] == 2 * 4249
    assert values[("kilotune_client_up_bytes_total", (("client", ODD),))] == 0
    assert values[("kilotune_clients", (("status", "ok"),))] == 1
    assert values[("kilotune_clients", (("status", "error"),))] == 1
    assert sum(value for (name, _), value in values.items() if name == "kilotune_clients") == 2
    assert values[("kilotune_client_last_seen_timestamp_seconds", (("client", "ada"),))] == 200.0
    assert values[("kilotune_refusals_total", (("reason", "values"),))] == 2
    assert values[("kilotune_loss", ())] == 1.115
    assert values[("kilotune_train_loss", ())] == 1.25
    assert values[("kilotune_exact_match", ())] == 0.25
    assert values[("kilotune_epsilon", ())] == 1.5
    assert values[("kilotune_epsilon_budget", ())] == 8.0
    assert values[("kilotune_disk_free_bytes", ())] == MACHINE["disk_free_bytes"]
    assert values[("kilotune_client_peak_memory_bytes", ())] == 1e9
    assert values[("kilotune_build_info", (("version", "1.2.3"),))] == 1
    assert types["kilotune_rounds"] == types["kilotune_bytes"] == types["kilotune_refusals"] == "counter"
    assert types["kilotune_round_seconds"] == "summary"
    assert types["kilotune_loss"] == "gauge"
    assert all(family.documentation for family in families)


def test_what_is_not_known_is_left_out():
    """Kills: a loss of zero before anything is measured, which an alert would take for a miracle."""
    values, _, _ = scraped(RunView({}, None))
    names = {name for name, _ in values}
    for name in ("kilotune_loss", "kilotune_rouge_l", "kilotune_epsilon", "kilotune_rounds_planned"):
        assert name not in names
    assert values[("kilotune_rounds_total", ())] == 0


def test_the_text_is_one_family_after_the_other():
    """Kills: a family in two pieces, which scrapers refuse; a missing end of line."""
    text = exposition(full().snapshot(), MACHINE, "1")
    assert text.endswith("\n")
    assert "\n\n" not in text
    heads = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(heads) == len(set(heads))
    order = []
    for line in text.splitlines():
        if not line.startswith("#"):
            name = max((head for head in heads if line.startswith(head)), key=len)
            order += [name] if order[-1:] != [name] else []
    assert order == heads


def test_a_rejected_round_shows():
    """Kills: a failure that no metric tells."""
    view = full()
    assert scraped(view)[0][("kilotune_last_round_failed", ())] == 0
    view.fold({"event": "rejected", "round": 3, "why": "above the gate"})
    values, _, _ = scraped(view)
    assert values[("kilotune_last_round_failed", ())] == 1
    assert values[("kilotune_rejected_rounds_total", ())] == 1
