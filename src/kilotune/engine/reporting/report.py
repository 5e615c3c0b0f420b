"""Report: one HTML file per run folder, that needs no network, no script and no second file.

It says what the run's own files say (recipe, metrics, summary, ledger header) and nothing else. A run that is not
finished gets the same page with what is known so far.
"""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kilotune.core.units import human_bytes, human_seconds
from kilotune.engine.files import write_bytes
from kilotune.engine.reporting._charts import charts
from kilotune.engine.reporting._history import History, Part, reading
from kilotune.engine.reporting._page import cards, code, details, facts, heading, note, number, page, section
from kilotune.engine.reporting._tables import all_figures, clients_table, incidents_table, socket_table
from kilotune.engine.rounds.ledger import LEDGER
from kilotune.engine.runfolder import RECIPE, REPORT, SUMMARY, RunFolder

Facts = dict[str, Any]


def write_report(run: RunFolder) -> Path:
    """Write report.html into the folder. Raises RunError when it is no run folder."""
    recipe, history = run.recipe(), History(run.events())
    summary = run.summary() if (run.path / SUMMARY).exists() else {}
    name = run.path.resolve().name
    unit = "step" if history.steps or (recipe.get("steps") and not history.rounds) else "round"
    parts = history.parts()
    body = [
        _head(name, recipe),
        _state(recipe, summary, history, unit),
        _withdrawals(run),
        cards(_headline(recipe, summary, history, parts, unit)),
        section("Curves", charts(history, parts, unit)),
        section("Privacy", _privacy(summary.get("privacy"))),
        section("Clients", clients_table(parts, history)),
        section("Refused, failed and missing clients", incidents_table(history)),
        section("Bytes on the socket", socket_table(summary.get("socket"))),
        section("Use the result", _usage(run, recipe, summary)),
        section("What this run is", _identity(run, recipe, summary)),
        section("All figures", all_figures(history, unit)),
    ]
    path = run.path / REPORT
    write_bytes(path, page(f"{name} · kilotune", "".join(body)).encode())
    return path


def _head(name: str, recipe: Facts) -> str:
    source = f"Source: {recipe['source']}" if recipe.get("source") else ""
    return heading(name) + note(recipe.get("title") or "", "lead") + note(source)


def _state(recipe: Facts, summary: Facts, history: History, unit: str) -> str:
    """Everything that keeps the figures from being the whole story."""
    lines = []
    done = history.steps[-1]["step"] if history.steps else history.last_round
    if not summary:
        planned = recipe.get(f"{unit}s")
        of = f" of {planned}" if planned else ""
        lines.append(f"This run is not finished: {done}{of} {unit}s so far. Run its command again to go on.")
    if history.stopped:
        lines.append(f"Stopped early after {unit} {done}: {history.stopped['why']}.")
    if history.unrecorded:
        numbers = ", ".join(map(str, history.unrecorded))
        lines.append(f"The figures of these rounds were lost when a process ended: {numbers}. The ledger holds them.")
    for who, event in sorted(history.cut.items())[:5]:
        lines.append(f"{who}: {event['cut']} of {event['rows']} rows were longer than max_length and were cut.")
    return "".join(note(line, "warn") for line in lines)


def _withdrawals(run: RunFolder) -> str:
    """Whose part was taken out of this run."""
    lines = []
    for event in run.events():
        if event["event"] == "withdrawal":
            what = "was taken out of every round" if event["how"] == "subtract" else "left; its rounds were taken back"
            lines.append(f"Client {event['client']} {what}. See withdrawal-*.json, the signed certificate.")
    return "".join(note(line, "warn") for line in lines)


# -- headline ---------------------------------------------------------------------------------------------------


def _headline(
    recipe: Facts, summary: Facts, history: History, parts: dict[str, Part], unit: str
) -> list[tuple[str, str, str]]:
    before, after = _before_and_after(summary, history)
    items = [
        _change("Held-out loss", before, after, "loss", number),
        _change("Exact match", before, after, "exact_match", _percent_number, " %"),
        _change("ROUGE-L", before, after, "rouge_l", _percent_number, " %"),
    ]
    if history.rounds and not history.alone:
        items += _traffic(summary, history)
    outputs = summary.get("outputs") or {}
    if "seed_file_bytes" in outputs:
        items.append(("Seed file", human_bytes(outputs["seed_file_bytes"]), "the whole fine-tune"))
    items += _secure(history)
    items.append(_length(recipe, summary, history, parts, unit))
    if "peak_rss_bytes" in summary:
        items.append(("Peak memory", human_bytes(summary["peak_rss_bytes"]), "largest process"))
    if "seconds" in summary:
        items.append(("Time", human_seconds(summary["seconds"]), "loading and evaluation included"))
    if history.steps:
        spent = sum(s["seconds"] for s in history.steps)
        items.append(("Time per step", human_seconds(spent / len(history.steps)), "mean"))
    return [item for item in items if item[1]]


def _before_and_after(summary: Facts, history: History) -> tuple[Facts, Facts]:
    known = summary.get("eval") or {}
    first = history.evaluations.get(0, {}).get("overall")
    last = next((e["overall"] for n, e in reversed(history.evaluations.items()) if n > 0), None)
    return known.get("before") or first or {}, known.get("after") or last or {}


def _change(
    name: str, before: Facts, after: Facts, key: str, text: Callable[[float], str], unit: str = ""
) -> tuple[str, str, str]:
    readings = [text(value) for figures in (before, after) if (value := reading(figures, key)) is not None]
    rows = after.get("num_examples", before.get("num_examples"))
    return name, " → ".join(readings) + unit if readings else "", f"{rows:,} held-out rows" if rows else ""


def _traffic(summary: Facts, history: History) -> list[tuple[str, str, str]]:
    up, down = sum(r["up_bytes"] for r in history.rounds), sum(r["down_bytes"] for r in history.rounds)
    answers, asked = sum(r["clients"] for r in history.rounds), sum(r["asked"] for r in history.rounds)
    mean_up = summary.get("payload_up_bytes_per_client_round", up / max(1, answers))
    mean_down = summary.get("payload_down_bytes_per_client_round", down / max(1, asked))
    return [
        ("Up", human_bytes(mean_up), "payload per client and round"),
        ("Down", human_bytes(mean_down), "payload per client and round"),
        ("Payload of all rounds", human_bytes(up + down), f"{human_bytes(up)} up, {human_bytes(down)} down"),
    ]


def _secure(history: History) -> list[tuple[str, str, str]]:
    """What secure aggregation cost, of the rounds that have it."""
    rounds = [r for r in history.rounds if "secure" in r]
    if not rounds:
        return []
    clients = sum(r["clients"] for r in rounds)
    up, down = (sum(r["secure"][f"added_{way}_bytes"] for r in rounds) / max(1, clients) for way in ("up", "down"))
    spent = sum(r["secure"]["seconds"] for r in rounds) / len(rounds)
    clipped = sum(r["secure"]["clipped_frac"] for r in rounds) / len(rounds)
    return [
        (
            "Secure aggregation",
            f"+{human_bytes(up)} up, +{human_bytes(down)} down",
            "per client and round, in the above",
        ),
        ("Its stages", human_seconds(spent), "per round, beside training"),
        ("Numbers clipped", f"{_percent_number(clipped)} %", "by the clients, to secure_aggregation.clip"),
    ]


def _length(recipe: Facts, summary: Facts, history: History, parts: dict[str, Part], unit: str) -> tuple[str, str, str]:
    if unit == "step":
        done, small = summary.get("steps", history.steps[-1]["step"] if history.steps else 0), ""
    else:
        done = summary.get("rounds", history.last_round)
        clients = summary.get("clients", sum(1 for p in parts.values() if p.rounds))
        small = "" if history.alone else f"{clients:,} client{'s' if clients != 1 else ''}"
    planned = recipe.get(f"{unit}s")
    return f"{unit.capitalize()}s", f"{done:,}" if summary or not planned else f"{done:,} of {planned:,}", small


def _privacy(told: Facts | None) -> str:
    """What may be said of everything this run has released."""
    if not told:
        return ""
    items = [
        ("Guarantee", f"epsilon {told['epsilon']:.4g}, delta {told['delta']:g} for each {told['unit']}"),
        ("Neighbouring data", told["neighbours"]),
        ("Sampling", told["sampling"]),
        ("Rounds", told.get("rounds")),
        ("Clip", told["clip"]),
        ("Noise multiplier", told["noise_multiplier"] or "each client's own, see its privacy.json"),
        ("Budget", told["budget"]),
        ("Accountant", told.get("accountant")),
    ]
    return facts([(name, str(value)) for name, value in items if value is not None])


# -- what it is and how to use it ---------------------------------------------------------------------------------


def _usage(run: RunFolder, recipe: Facts, summary: Facts) -> str:
    if not summary:
        return ""
    folder = run.path.name if run.path.is_absolute() else str(run.path)
    where = shlex.quote(folder if folder not in ("", ".") else run.path.resolve().name)
    base = shlex.quote(str(summary.get("base") or recipe.get("base")))
    outputs = summary.get("outputs") or {}
    lines = [f"# talk to it, base and tuned side by side\nkilotune chat {where} --compare"]
    if (run.path / LEDGER).exists():
        lines.append(f"# verify every round and rebuild the weights\nkilotune replay {where}")
    if "seed_file" in outputs:
        file = shlex.quote(f"{folder}/{outputs['seed_file']}")
        lines.append(f"# base + seed file = tuned model\nkilotune apply --base {base} {file} -o DIR")
    if "adapter" in outputs:
        lines.append(f"# the adapter as a PEFT folder\nkilotune export {where} --to peft -o DIR")
    lines.append(f"# a whole model for other tools\nkilotune merge {where} -o DIR")
    return code("\n\n".join(lines))


def _identity(run: RunFolder, recipe: Facts, summary: Facts) -> str:
    known = {**_ledger_header(run), **summary}
    ends = summary.get("client_digests") or {}
    equal = sorted(client for client, digest in ends.items() if digest == summary["digest"])
    items = [
        ("Weights digest", known.get("digest")),
        ("Base", known.get("base") or recipe.get("base")),
        ("Base digest", known.get("base_digest")),
        ("Recipe id", known.get("recipe_id")),
        ("Ledger head", known.get("ledger_head")),
        ("Clients with equal weights", ", ".join(equal)),
    ]
    text = (run.path / RECIPE).read_text(encoding="utf-8")
    shown = [(name, str(value)) for name, value in items if value]
    return facts(shown) + details("Resolved recipe (YAML)", code(text))


def _ledger_header(run: RunFolder) -> Facts:
    """Base and recipe of a run without a summary."""
    path = run.path / LEDGER
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    header = json.loads(first) if first else {}
    return {key: header[key] for key in ("base", "base_digest", "recipe_id") if key in header}


def _percent_number(value: float) -> str:
    return f"{100 * value:.1f}"
