"""The report's tables: clients, what went wrong, socket bytes, and every number behind the charts."""

import json
from typing import Any

from kilotune.core.units import human_seconds
from kilotune.engine.reporting._history import FAILURES, Event, History, Part, reading
from kilotune.engine.reporting._page import Cell, details, percent, table

MAX_ROWS = 200
MAX_STEPS = 1500
CLIENT_COLUMNS = (
    "client",
    "rows",
    "rounds",
    "training loss",
    "loss before",
    "loss after",
    "exact match before",
    "exact match after",
    "bytes up",
    "seconds",
    "failures",
)


def clients_table(parts: dict[str, Part], history: History) -> str:
    hidden = history.spent and not any(part.rounds for part in parts.values())  # who took part is not told
    if not parts or history.alone or history.steps or hidden:
        return ""
    rows: list[list[Cell]] = [
        [
            client,
            part.rows,
            part.rounds,
            part.loss,
            reading(part.before, "loss"),
            reading(part.after, "loss"),
            _percent(part.before, "exact_match"),
            _percent(part.after, "exact_match"),
            part.up_bytes,
            f"{part.seconds:.1f}",
            part.failures,
        ]
        for client, part in parts.items()
    ]
    more = f" The first {MAX_ROWS:,} of {len(rows):,}; metrics.jsonl has all." if len(rows) > MAX_ROWS else ""
    caption = (
        "Loss and exact match: the client's held-out rows. Bytes up: payload of all rounds it took part in." + more
    )
    return table(caption, CLIENT_COLUMNS, rows[:MAX_ROWS])


def incidents_table(history: History) -> str:
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


def socket_table(socket: Any) -> str:
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


def all_figures(history: History, unit: str) -> str:
    """The numbers behind the charts, for reading without them."""
    return details(f"Every {unit}", _every_round(history) + _every_step(history)) + details(
        "Every evaluation", _every_evaluation(history, unit)
    )


def _every_round(history: History) -> str:
    rows: list[list[Cell]] = []
    total = 0
    for r in history.rounds:
        total += r["up_bytes"] + r["down_bytes"]
        took = f"{r['seconds']:.2f}"
        if history.alone:
            rows.append([r["round"], None, reading(r, "loss"), None, None, None, None, took])
        else:
            clients = f"{r['clients']} of {r['asked']}"
            told = [reading(r, "loss"), reading(r, "epsilon")]
            rows.append([r["round"], clients, *told, r["up_bytes"], r["down_bytes"], total, took])
    columns = [
        "round",
        "clients",
        "training loss",
        "epsilon so far",
        "bytes up",
        "bytes down",
        "bytes so far",
        "seconds",
    ]
    caption = "Payload bytes of the rounds; evaluations and the hand-over of the last round are not among them."
    return table("" if history.alone else caption, columns, rows)


def _every_step(history: History) -> str:
    stride = -(-len(history.steps) // MAX_STEPS) or 1
    rows: list[list[Cell]] = [
        [s["step"], reading(s, "loss"), s["tokens"], f"{s['seconds']:.2f}"] for s in history.steps[::stride]
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
                _percent(overall, "exact_match"),
                _percent(overall, "rouge_l"),
                overall.get("num_examples"),
                history.payload_until(number) if history.rounds and not history.alone else None,
            ]
        )
    columns = [f"after {unit}", "loss", "perplexity", "exact match", "ROUGE-L", "rows", "payload bytes so far"]
    return table("On held-out rows; 0 is the base.", columns, rows)


def _percent(figures: Event, key: str) -> str | None:
    value = reading(figures, key)
    return None if value is None else percent(value)
