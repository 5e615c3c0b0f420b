"""The report's charts: which curves a run has, and what they are called."""

from collections.abc import Callable, Sequence

from kilotune.core.units import byte_unit
from kilotune.engine.reporting._history import History, Part, reading
from kilotune.engine.reporting._page import figure, note, number
from kilotune.engine.reporting._svg import Series, before_after, line_chart, mirror_bars

MAX_POINTS = 1500
MAX_COMPARED = 24
SMOOTH_FROM, SMOOTH_TO = 60, 40


def charts(history: History, parts: dict[str, Part], unit: str) -> str:
    """All curves the run has readings for; payload only where bytes crossed between machines."""
    loss, match = history.measured("loss"), [(n, 100 * v) for n, v in history.measured("exact_match")]
    by_bytes = bool(history.rounds) and not history.alone
    size, unit_bytes = byte_unit(history.payload_until(history.last_round))
    payload = (
        f"payload ({unit_bytes})",
        "Bytes of all clients, up and down, so far",
        lambda n: history.payload_until(n) / size,
    )
    title = f"Loss by {unit}"
    lines = [*_training(history, unit), Series("held-out", loss, "c1")]
    below = (
        "Training: last local step, mean of the clients"
        if unit == "round"
        else "Training: the steps' batches, and means"
    )
    drawn = figure(title, below, line_chart(title, lines, unit, number, whole_x=True))
    if by_bytes:
        drawn += _against("Held-out loss", *payload, loss, number)
    title = f"Exact match (%) by {unit}"
    svg = line_chart(title, [Series("", match)], unit, _percent, whole_x=True, top=100.0)
    drawn += figure(title, "Held-out rows answered word for word", svg)
    if by_bytes:
        drawn += _against("Exact match (%)", *payload, match, _percent, 100.0)
        drawn += _bytes_chart(history)
    epsilon = "epsilon", "What was spent of the privacy budget so far", dict(history.spent).get
    drawn += _against("Held-out loss", *epsilon, loss, number)
    drawn += _against("Exact match (%)", *epsilon, match, _percent, 100.0)
    drawn += _compared(parts)
    return f'<div class="charts">{drawn}</div>\n' if drawn else note("Nothing was recorded yet.")


def _against(
    what: str,
    axis: str,
    below: str,
    place: Callable[[int], float | None],
    points: Sequence[tuple[int, float]],
    text: Callable[[float], str],
    top: float | None = None,
) -> str:
    """Readings over another axis than rounds: `place` says where a round lies on it, if it does."""
    moved = [(at, value) for n, value in points if (at := place(n)) is not None]
    title = f"{what} by {axis.split()[0]}"
    return figure(title, below, line_chart(title, [Series("", moved)], axis, text, top=top))


def _training(history: History, unit: str) -> list[Series]:
    """The training loss; many noisy steps are drawn faint, with the means of equal stretches on top."""
    events = history.steps if unit == "step" else history.rounds
    points = [(float(e[unit]), value) for e in events if (value := reading(e, "loss")) is not None]
    if len(points) <= SMOOTH_FROM or unit == "round":
        return [Series("training", points, "c2")]
    size = -(-len(points) // SMOOTH_TO)
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    means = [(sum(x for x, _ in s) / len(s), sum(y for _, y in s) / len(s)) for s in stretches]
    return [Series("", points[:: -(-len(points) // MAX_POINTS)], "faint"), Series("training", means, "c2")]


def _bytes_chart(history: History) -> str:
    largest = max(max(r["up_bytes"], r["down_bytes"]) for r in history.rounds)
    size, name = byte_unit(largest)
    up = [(float(r["round"]), r["up_bytes"] / size) for r in history.rounds]
    down = [(float(r["round"]), r["down_bytes"] / size) for r in history.rounds]
    title = f"Payload per round ({name})"
    svg = mirror_bars(title, up, down, "round", name)
    return figure(title, "All clients together; up from the clients, down to them", svg)


def _compared(parts: dict[str, Part]) -> str:
    """Who gained: a federation is good when every client is better off, not only the mean."""
    rows = []
    for client, part in parts.items():
        before, after = reading(part.before, "loss"), reading(part.after, "loss")
        if before is not None and after is not None:
            rows.append((client, before, after))
    if not 1 < len(rows) <= MAX_COMPARED:
        return ""
    title = "Held-out loss by client"
    return figure(title, "Each client's own held-out rows, before and after", before_after(title, rows, number))


def _percent(value: float) -> str:
    return f"{value:.1f} %"
