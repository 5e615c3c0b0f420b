"""Report: one HTML file per run folder, that needs no network, no script and no second file.

It says what the run's own files say (recipe, metrics, summary, ledger header) and nothing else. A run that is not
finished gets the same page with what is known so far.
"""

import json
import shlex
from pathlib import Path
from typing import Any

from kilotune.core.units import byte_unit, human_bytes, human_seconds
from kilotune.engine._history import FAILURES, History, Part, reading
from kilotune.engine._page import Cell, cards, code, details, facts, figure, note, page, section, table
from kilotune.engine._svg import Series, before_after, line_chart, mirror_bars
from kilotune.engine.files import write_bytes
from kilotune.engine.ledger import LEDGER
from kilotune.engine.runfolder import RECIPE, REPORT, SUMMARY, RunFolder

MAX_ROWS = 200
MAX_POINTS = 1500
MAX_COMPARED = 24
SMOOTH_FROM, SMOOTH_TO = 60, 40

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
        cards(_headline(recipe, summary, history, parts, unit)),
        section("Curves", _charts(history, parts, unit)),
        section("Clients", _clients(parts, history)),
        section("Refused, failed and missing clients", _incidents(history)),
        section("Bytes on the socket", _socket(summary.get("socket"))),
        section("Use the result", _usage(run, recipe, summary)),
        section("What this run is", _identity(run, recipe, summary)),
        section("All figures", _figures(history, unit)),
    ]
    path = run.path / REPORT
    write_bytes(path, page(f"{name} · kilotune", "".join(body)).encode())
    return path


def _head(name: str, recipe: Facts) -> str:
    source = f"Recipe after {recipe['source']}" if recipe.get("source") else ""
    return section_title(name) + note(recipe.get("title") or "", "lead") + note(source)


def section_title(name: str) -> str:
    from html import escape

    return f"<h1>{escape(name)}</h1>\n"


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


# -- headline ---------------------------------------------------------------------------------------------------


def _headline(
    recipe: Facts, summary: Facts, history: History, parts: dict[str, Part], unit: str
) -> list[tuple[str, str, str]]:
    before, after = _before_and_after(summary, history)
    items = [_change("Held-out loss", before, after, "loss", _number)]
    items += [_change(n, before, after, k, _percent) for n, k in (("Exact match", "exact_match"), ("ROUGE-L", "rouge_l"))]
    if history.rounds and not history.alone:
        items += _traffic(summary, history)
    outputs = summary.get("outputs") or {}
    if "seed_file_bytes" in outputs:
        items.append(("Seed file", human_bytes(outputs["seed_file_bytes"]), "the whole fine-tune"))
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


def _change(name: str, before: Facts, after: Facts, key: str, text: Any) -> tuple[str, str, str]:
    old, new = reading(before, key), reading(after, key)
    rows = after.get("num_examples", before.get("num_examples"))
    readings = [text(value) for value in (old, new) if value is not None]
    return name, " → ".join(readings), f"{rows:,} held-out rows" if rows else ""


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


def _length(
    recipe: Facts, summary: Facts, history: History, parts: dict[str, Part], unit: str
) -> tuple[str, str, str]:
    if unit == "step":
        done, small = summary.get("steps", history.steps[-1]["step"] if history.steps else 0), ""
    else:
        done = summary.get("rounds", history.last_round)
        clients = summary.get("clients", sum(1 for p in parts.values() if p.rounds))
        small = "" if history.alone else f"{clients:,} client{'s' if clients != 1 else ''}"
    planned = recipe.get(f"{unit}s")
    return f"{unit.capitalize()}s", f"{done:,}" if summary or not planned else f"{done:,} of {planned:,}", small


# -- charts -----------------------------------------------------------------------------------------------------


def _charts(history: History, parts: dict[str, Part], unit: str) -> str:
    training = _training(history, unit)
    loss, match = history.measured("loss"), [(n, 100 * v) for n, v in history.measured("exact_match")]
    below = "Training: mean of the clients' last local step" if unit == "round" else "Training: each step's batch"
    charts = figure(
        f"Loss by {unit}",
        f"{below}; held-out: the evaluation rows",
        line_chart(f"Loss by {unit}", [*training, Series("held-out", loss, "c1")], unit, _number, whole_x=True),
    )
    by_bytes = bool(history.rounds) and not history.alone
    size, name = byte_unit(history.payload_until(history.last_round))
    for title, points, text, top in (("Held-out loss", loss, _number, None), ("Exact match (%)", match, _points, 100.0)):
        if title != "Held-out loss":
            series = [Series("", points)]
            svg = line_chart(f"{title} by {unit}", series, unit, text, whole_x=True, top=top)
            charts += figure(f"{title} by {unit}", "Held-out rows answered word for word", svg)
        if by_bytes:
            moved = [Series("", [(history.payload_until(n) / size, v) for n, v in points])]
            svg = line_chart(f"{title} by payload", moved, f"payload ({name})", text, top=top)
            charts += figure(f"{title} by payload", "Bytes of all clients, up and down, so far", svg)
    if by_bytes:
        charts += _bytes_chart(history)
    compared = [
        (client, old, new)
        for client, part in parts.items()
        if (old := reading(part.before, "loss")) is not None and (new := reading(part.after, "loss")) is not None
    ]
    if 1 < len(compared) <= MAX_COMPARED:
        svg = before_after("Held-out loss by client", compared, _number)
        charts += figure("Held-out loss by client", "Each client's own held-out rows, before and after", svg)
    return f'<div class="charts">{charts}</div>\n' if charts else note("Nothing was recorded yet.")


def _training(history: History, unit: str) -> list[Series]:
    """The training loss; many noisy steps are drawn faint, with the means of equal stretches on top."""
    events = history.steps if unit == "step" else history.rounds
    points = [(float(e[unit]), value) for e in events if (value := reading(e, "loss")) is not None]
    if len(points) <= SMOOTH_FROM or unit == "round":
        return [Series("training", points, "c2")]
    size = -(-len(points) // SMOOTH_TO)
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    means = [(s[-1][0], sum(y for _, y in s) / len(s)) for s in stretches]
    return [Series("", points[:: -(-len(points) // MAX_POINTS)], "faint"), Series("training", means, "c2")]


def _bytes_chart(history: History) -> str:
    largest = max(max(r["up_bytes"], r["down_bytes"]) for r in history.rounds)
    size, name = byte_unit(largest)
    up = [(float(r["round"]), r["up_bytes"] / size) for r in history.rounds]
    down = [(float(r["round"]), r["down_bytes"] / size) for r in history.rounds]
    title = f"Payload per round ({name})"
    return figure(title, "All clients together; up from the clients, down to them", mirror_bars(title, up, down, "round", name))


# -- tables -----------------------------------------------------------------------------------------------------


def _clients(parts: dict[str, Part], history: History) -> str:
    if not parts or history.alone or history.steps:
        return ""
    columns: list[tuple[str, list[Cell]]] = [
        ("client", list(parts)),
        ("rows", [p.rows for p in parts.values()]),
        ("rounds", [p.rounds for p in parts.values()]),
        ("training loss", [p.loss for p in parts.values()]),
        ("loss before", [reading(p.before, "loss") for p in parts.values()]),
        ("loss after", [reading(p.after, "loss") for p in parts.values()]),
        ("exact match before", [_percent_or_none(p.before, "exact_match") for p in parts.values()]),
        ("exact match after", [_percent_or_none(p.after, "exact_match") for p in parts.values()]),
        ("bytes up", [p.up_bytes for p in parts.values()]),
        ("seconds", [round(p.seconds, 1) for p in parts.values()]),
        ("failures", [p.failures for p in parts.values()]),
    ]
    kept = [(name, cells) for name, cells in columns if any(cell is not None for cell in cells)]
    rows = [list(row) for row in zip(*(cells for _, cells in kept), strict=True)]
    more = f" The first {MAX_ROWS:,} of {len(rows):,}; metrics.jsonl has all." if len(rows) > MAX_ROWS else ""
    caption = "Loss and exact match: the client's held-out rows. Bytes up: payload of all rounds it took part in." + more
    return table(caption, [name for name, _ in kept], rows[:MAX_ROWS])


def _incidents(history: History) -> str:
    rows: list[list[Cell]] = [
        [
            human_seconds(max(0.0, float(e.get("time", history.start)) - history.start)),
            str(e["round"]) if "round" in e else "–",
            str(e["client"]),
            FAILURES[e["status"]],
            str(e.get("why") or ""),
        ]
        for e in history.incidents
    ]
    more = f" The last {MAX_ROWS:,} of {len(rows):,}." if len(rows) > MAX_ROWS else ""
    caption = "Rounds went on without them. Time since the run began." + more
    return table(caption, ["after", "round", "client", "what", "why"], rows[-MAX_ROWS:], text_columns=5)


def _socket(socket: Any) -> str:
    """Whatever the transport counted: one row per client when it is a dict of dicts."""
    if not isinstance(socket, dict) or not socket:
        return ""
    inner = {name: counts if isinstance(counts, dict) else {"bytes": counts} for name, counts in socket.items()}
    keys = list(dict.fromkeys(key for counts in inner.values() for key in counts))
    rows: list[list[Cell]] = [[str(name), *(_plain(counts.get(key)) for key in keys)] for name, counts in inner.items()]
    caption = (
        "What crossed each client's connection in bytes, framing and encryption included. Idle: joining, waiting, "
        "heartbeats, refused requests."
    )
    return table(caption, ["client", *(str(key).replace("_", " ") for key in keys)], rows)


def _plain(value: Any) -> Cell:
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value)


def _figures(history: History, unit: str) -> str:
    """The numbers behind the charts, for reading without them."""
    return details(f"Every {unit}", _every_round(history) + _every_step(history)) + details(
        "Every evaluation", _every_evaluation(history, unit)
    )


def _every_round(history: History) -> str:
    rows: list[list[Cell]] = []
    total = 0
    for r in history.rounds:
        total += r["up_bytes"] + r["down_bytes"]
        of = f"{r['clients']} of {r['asked']}"
        rows.append(
            [r["round"], of, reading(r, "loss"), r["up_bytes"], r["down_bytes"], total, round(r["seconds"], 2)]
        )
    columns = ["round", "clients", "training loss", "bytes up", "bytes down", "bytes so far", "seconds"]
    caption = "Payload bytes of the rounds; evaluations and the hand-over of the last round are not among them."
    return table(caption, columns, rows)


def _every_step(history: History) -> str:
    stride = -(-len(history.steps) // MAX_POINTS) or 1
    rows: list[list[Cell]] = [
        [s["step"], reading(s, "loss"), s["tokens"], round(s["seconds"], 2)] for s in history.steps[::stride]
    ]
    caption = f"Every {stride}th step; metrics.jsonl has all." if stride > 1 else "Tokens: those that carry loss."
    return table(caption, ["step", "training loss", "tokens", "seconds"], rows)


def _every_evaluation(history: History, unit: str) -> str:
    rows: list[list[Cell]] = []
    for number, event in history.evaluations.items():
        overall = event["overall"]
        rows.append(
            [
                number,
                reading(overall, "loss"),
                reading(overall, "perplexity"),
                _percent_or_none(overall, "exact_match"),
                _percent_or_none(overall, "rouge_l"),
                overall.get("num_examples"),
                history.payload_until(number) if history.rounds else None,
            ]
        )
    columns = [f"after {unit}", "loss", "perplexity", "exact match", "ROUGE-L", "rows", "payload bytes so far"]
    return table("On held-out rows; 0 is the base.", columns, rows)


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
    items = [
        ("Weights digest", known.get("digest")),
        ("Base", known.get("base") or recipe.get("base")),
        ("Base digest", known.get("base_digest")),
        ("Recipe id", known.get("recipe_id")),
        ("Ledger head", known.get("ledger_head")),
        ("Ended with these weights", ", ".join(sorted(summary.get("client_digests") or {}))),
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


def _number(value: float) -> str:
    return f"{value:.3f}"


def _points(value: float) -> str:
    return f"{value:.1f} %"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _percent_or_none(figures: Facts, key: str) -> str | None:
    value = reading(figures, key)
    return None if value is None else _percent(value)
