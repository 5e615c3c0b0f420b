"""Metrics in Prometheus' text format 0.0.4, made from one snapshot of a RunView.

Source: "Exposition formats", the Prometheus project's documentation. Labels have few values: the names of enrolled
clients, the classes of refusals, two directions.
"""

import math
from collections.abc import Iterable
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATUSES = ("joined", "ok", "missing", "refused", "error", "astray", "away")

CLIPPED = {
    "clipped_scalars": "Share of the last round's coefficients that were cut.",
    "clipped_norms": "Share of the last round's updates that were scaled down.",
}

Labels = dict[str, str]
Sample = tuple[str, Labels, float]  # suffix of the name, labels, value


def exposition(state: dict[str, Any], machine: dict[str, float], version: str) -> str:
    """All metrics as text; what is not known yet is left out, so that nothing is ever a made-up zero."""
    totals, clients = state["totals"], state["clients"]
    lines: list[str] = []

    def metric(name: str, kind: str, about: str, samples: Iterable[Sample]) -> None:
        found = [_line(f"kilotune_{name}{suffix}", labels, value) for suffix, labels, value in samples]
        if found:
            lines.extend([f"# HELP kilotune_{name} {_escape_help(about)}", f"# TYPE kilotune_{name} {kind}", *found])

    metric("build_info", "gauge", "Version of kilotune; always 1.", [("", {"version": version}, 1)])
    metric("rounds_total", "counter", "Rounds in the ledger.", [("", {}, state["round"])])
    metric("rounds_planned", "gauge", "Rounds of the recipe.", _known(state["planned"]))
    spent: list[Sample] = [("_sum", {}, totals["round_seconds"]), ("_count", {}, totals["rounds"])]
    metric("round_seconds", "summary", "Seconds a round took.", spent)
    last = state["rounds"][-1] if state["rounds"] else {}
    metric("last_round_seconds", "gauge", "Seconds of the last round.", _known(last.get("seconds")))
    metric("last_round_timestamp_seconds", "gauge", "When the last round ended.", _known(state["last_round_at"]))
    metric("last_round_failed", "gauge", "1 when the last round failed.", [("", {}, bool(state["problem"]))])
    directions = [("", {"direction": way}, totals[f"{way}_bytes"]) for way in ("up", "down")]
    metric("bytes_total", "counter", "Payload bytes, clients to server (up) and back (down).", directions)
    sent = [("", {"client": name}, client["up_bytes"]) for name, client in clients.items()]
    metric("client_up_bytes_total", "counter", "Payload bytes a client has sent.", sent)
    standing = [("", {"status": s}, sum(c["status"] == s for c in clients.values())) for s in STATUSES]
    metric("clients", "gauge", "Clients by the last thing known of them.", standing)
    seen = [("", {"client": n}, c["last_seen"]) for n, c in clients.items() if c["last_seen"] is not None]
    metric("client_last_seen_timestamp_seconds", "gauge", "Last word from a client.", seen)
    metric("answers_total", "counter", "Answers that counted.", [("", {}, totals["answers"])])
    metric("missing_total", "counter", "Answers that did not come in time.", [("", {}, totals["missing"])])
    metric("rejected_rounds_total", "counter", "Rounds the gate took back.", [("", {}, totals["rejected"])])
    refusals = [("", {"reason": reason}, count) for reason, count in totals["refusals"].items()]
    metric("refusals_total", "counter", "Clients, answers and rounds refused, by class of reason.", refusals)
    metric("train_loss", "gauge", "Mean training loss of the last round.", _known(last.get("loss")))
    _quality(metric, state["quality"])
    privacy, defences = state["privacy"], state["defences"]
    for key, about in CLIPPED.items():
        metric(f"{key}_ratio", "gauge", about, _known(defences.get(key)))
    metric("epsilon", "gauge", "Privacy spent so far.", _known(privacy.get("epsilon")))
    metric("epsilon_budget", "gauge", "Privacy that may be spent.", _known(privacy.get("budget")))
    peak = max((c["peak_rss_bytes"] for c in clients.values()), default=0)
    metric("client_peak_memory_bytes", "gauge", "Largest peak memory a client has told.", _known(peak or None))
    metric("server_peak_memory_bytes", "gauge", "Peak memory of the server.", _known(machine.get("peak_rss_bytes")))
    metric("disk_free_bytes", "gauge", "Free space where the run folder is.", _known(machine.get("disk_free_bytes")))
    return "\n".join(lines) + "\n"


def _quality(metric: Any, quality: list[dict[str, Any]]) -> None:
    latest = quality[-1] if quality else {}
    metric("loss", "gauge", "Loss on held-out rows at the last evaluation.", _known(latest.get("loss")))
    metric("exact_match", "gauge", "Share of held-out answers that are exact.", _known(latest.get("exact_match")))
    metric("rouge_l", "gauge", "ROUGE-L of held-out answers.", _known(latest.get("rouge_l")))


def _known(value: float | None) -> list[Sample]:
    return [] if value is None else [("", {}, value)]


def _line(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{key}="{_escape_label(text)}"' for key, text in labels.items())
    return f"{name}{{{inside}}} {_number(value)}" if inside else f"{name} {_number(value)}"


def _number(value: float) -> str:
    if isinstance(value, int):  # bool among them
        return str(int(value))
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value))


def _escape_label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _escape_help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")
