"""Charts as inline SVG text: lines, bars above and below zero, and before/after rows. Colours are CSS classes."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 264
LEFT, TOP, BOTTOM = 48, 12, 40
LETTER = 7.7  # width of a bold letter of an end label, on the generous side
MAX_MARKS = 40
LABEL_GAP = 15
NAME_LENGTH = 18

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line. `style` is a CSS class: c1, c2, or faint for a background line without end label."""

    label: str
    points: Sequence[Point]
    style: str = "c1"


@dataclass(frozen=True)
class Axis:
    """A range on the page: `at(lo)` = start, `at(hi)` = end."""

    ticks: tuple[float, ...]
    lo: float
    hi: float
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (value - self.lo) / (self.hi - self.lo) * (self.end - self.start)


def nice_step(span: float, intervals: int, whole: bool = False) -> float:
    """The smallest of 1, 2, 2.5, 5 × 10^k (1, 2, 5 for whole numbers) that cuts `span` into at most `intervals`."""
    rough = max(span, 1e-12) / intervals
    power = 10.0 ** math.floor(math.log10(rough))
    multiples = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(m * power for m in multiples if m * power >= rough * (1 - 1e-9))
    return max(1.0, step) if whole else step


def ticks(lo: float, hi: float, intervals: int = 5, whole: bool = False) -> tuple[float, ...]:
    """Round numbers that enclose [lo, hi]."""
    step = nice_step(hi - lo if hi > lo else max(abs(hi), 1.0), intervals, whole)
    first, last = math.floor(lo / step + 1e-9), math.ceil(hi / step - 1e-9)
    return tuple(i * step for i in range(first, max(last, first + 1) + 1))


def tick_text(values: Sequence[float]) -> Callable[[float], str]:
    """One number of decimals for a whole axis: as many as its ticks need."""
    for digits in range(7):
        if all(abs(round(v, digits) - v) < 1e-9 for v in values):
            return lambda v: f"{v:,.{digits}f}"
    return lambda v: f"{v:g}"


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    value: Callable[[float], str],
    whole_x: bool = False,
    top: float | None = None,
) -> str:
    """Lines named at their ends. `value` formats a reading; `top` caps the vertical axis (100 for percent)."""
    series = [s for s in series if s.points]
    if not series:
        return ""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    low = 0.0 if 0 <= min(ys) < 0.6 * max(ys) else min(ys)
    marks_y = ticks(low, max(ys) if max(ys) > low else low + 1e-3)
    marks_y = tuple(t for t in marks_y if top is None or t <= top)
    marks_x = ticks(min(xs), max(xs), 6, whole_x)
    right = max(xs) if max(xs) > min(xs) else marks_x[-1]
    named = [s for s in series if s.style != "faint"]
    labels = [f"{value(s.points[-1][1])} {s.label}".strip() for s in named]
    edge = WIDTH - 12 - LETTER * max(map(len, labels), default=0)
    x = Axis(tuple(t for t in marks_x if min(xs) <= t <= right), min(xs), right, LEFT, edge)
    y = Axis(marks_y, marks_y[0], max(marks_y[-1], max(ys)), HEIGHT - BOTTOM, TOP)
    body = _frame(x, y, x_label) + "".join(_line(s, x, y, x_label, value) for s in series)
    heights = _spread([y.at(s.points[-1][1]) for s in named])
    for line, label, height in zip(named, labels, heights, strict=True):
        body += _text(x.end + 8, height + 4, label, f"label {line.style}")
    return _svg(title, "; ".join(_told(s, value) for s in named), body)


def mirror_bars(title: str, up: Sequence[Point], down: Sequence[Point], x_label: str, unit: str) -> str:
    """Per x one bar above zero (up) and one below (down), both in `unit`."""
    if not up and not down:
        return ""
    xs = sorted({x for x, _ in [*up, *down]})
    high, low = max((v for _, v in up), default=0.0), max((v for _, v in down), default=0.0)
    marks_y = ticks(-low, high if high + low > 0 else 1.0, 8)
    marks_x = tuple(t for t in ticks(xs[0], xs[-1], 6, whole=True) if xs[0] <= t <= xs[-1])
    last = {w: next((v for at, v in reversed(p) if at == xs[-1]), 0.0) for w, p in (("up", up), ("down", down))}
    labels = [f"{word} {amount:,.1f} {unit}" for word, amount in last.items()]
    edge = WIDTH - 12 - LETTER * max(map(len, labels))
    x = Axis(marks_x, xs[0] - 0.5, xs[-1] + 0.5, LEFT, edge)
    y = Axis(marks_y, marks_y[0], marks_y[-1], HEIGHT - BOTTOM, TOP)
    slot = (x.end - x.start) / (xs[-1] - xs[0] + 1)
    width = min(slot * (0.72 if slot > 3 else 1.0), 28.0)
    body = _frame(x, y, x_label)
    for points, sign, style, word in ((up, 1, "c1", "up"), (down, -1, "c2", "down")):
        for at, amount in points:
            ends = sorted((y.at(0), y.at(sign * amount)))
            body += (
                f'<rect class="{style}" x="{x.at(at) - width / 2:.1f}" y="{ends[0]:.1f}" width="{width:.1f}" '
                f'height="{ends[1] - ends[0]:.1f}"><title>{x_label} {at:g}: {amount:.2f} {unit} {word}</title></rect>'
            )
    body += f'<line class="zero" x1="{x.start}" x2="{x.end}" y1="{y.at(0):.1f}" y2="{y.at(0):.1f}"/>'
    heights = _spread([y.at(high / 2), y.at(-low / 2)])
    for height, style, label in zip(heights, ("c1", "c2"), labels, strict=True):
        body += _text(x.end + 8, height + 4, label, f"label {style}")
    told = f"last {x_label}: {last['up']:.2f} {unit} up, {last['down']:.2f} {unit} down"
    return _svg(title, told, body)


def before_after(title: str, rows: Sequence[tuple[str, float, float]], value: Callable[[float], str]) -> str:
    """One line per name from a hollow dot (before) to a full dot (after), on a common axis from zero."""
    if not rows:
        return ""
    height = TOP + 24 * len(rows) + BOTTOM
    marks = ticks(0.0, max(max(b, a) for _, b, a in rows) or 1.0, 4)
    x = Axis(marks, 0.0, marks[-1], 180, WIDTH - 48)
    text = tick_text(marks)
    body = ""
    for tick in marks:
        body += f'<line class="grid" x1="{x.at(tick):.1f}" x2="{x.at(tick):.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>'
        body += _text(x.at(tick), height - BOTTOM + 16, text(tick), "tick middle")
    for index, (name, before, after) in enumerate(rows):
        at = TOP + 24 * index + 12
        short = name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"
        body += _text(130, at + 4, short, "name end")
        body += f'<line class="c1 thick" x1="{x.at(before):.1f}" x2="{x.at(after):.1f}" y1="{at}" y2="{at}"/>'
        body += f'<circle class="c1 hollow" cx="{x.at(before):.1f}" cy="{at}" r="4"/>'
        body += f'<circle class="c1" cx="{x.at(after):.1f}" cy="{at}" r="4.5"/>'
        left, right = min(before, after), max(before, after)
        body += _text(x.at(left) - 8, at + 4, value(left), "label small end" + (" c1" if left == after else ""))
        body += _text(x.at(right) + 8, at + 4, value(right), "label small" + (" c1" if right == after else ""))
    body += _text(x.end, height - 6, "○ before   ● after", "tick end")
    told = "; ".join(f"{name}: {value(before)} before, {value(after)} after" for name, before, after in rows)
    return _svg(title, told, body, height)


def _svg(title: str, description: str, body: str, height: int = HEIGHT) -> str:
    key = re.sub(r"[^a-z0-9]+", "-", title.lower())
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="t-{key} d-{key}">'
        f'<title id="t-{key}">{escape(title)}</title><desc id="d-{key}">{escape(description)}</desc>{body}</svg>'
    )


def _frame(x: Axis, y: Axis, x_label: str) -> str:
    """Grid lines, tick numbers (sizes without sign) and the name of the horizontal axis."""
    text_x, text_y = tick_text(x.ticks), tick_text(y.ticks)
    body = ""
    for tick in y.ticks:
        body += f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{y.at(tick):.1f}" y2="{y.at(tick):.1f}"/>'
        body += _text(x.start - 7, y.at(tick) + 4, text_y(abs(tick)), "tick end")
    for tick in x.ticks:
        body += _text(x.at(tick), y.start + 17, text_x(tick), "tick middle")
    return body + _text(x.end, HEIGHT - 6, x_label, "tick end")


def _line(series: Series, x: Axis, y: Axis, x_label: str, value: Callable[[float], str]) -> str:
    places = [(x.at(a), y.at(b)) for a, b in series.points]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    body = f'<polyline class="{series.style}" points="{path}"/>'
    if len(places) <= MAX_MARKS and series.style != "faint":
        for (a, b), (at, reading) in zip(places, series.points, strict=True):
            told = escape(f"{x_label} {at:g}: {value(reading)}")
            body += f'<circle class="{series.style}" cx="{a:.1f}" cy="{b:.1f}" r="3"><title>{told}</title></circle>'
    return body


def _spread(heights: list[float]) -> list[float]:
    """Move labels apart as little as can be, keeping their order, so that none covers another."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    blocks: list[tuple[float, int]] = []  # (sum, count) of labels that touch, each height less those of the ones above
    for rank, i in enumerate(order):
        total, count = heights[i] - rank * LABEL_GAP, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / count:
            above, more = blocks.pop()
            total, count = total + above, count + more
        blocks.append((total, count))
    tops = [total / count for total, count in blocks for _ in range(count)]
    for rank, i in enumerate(order):
        heights[i] = tops[rank] + rank * LABEL_GAP
    return heights


def _told(series: Series, value: Callable[[float], str]) -> str:
    first, last = series.points[0], series.points[-1]
    name = f"{series.label}: " if series.label else ""
    return f"{name}{value(first[1])} at {first[0]:g}, {value(last[1])} at {last[0]:g}"


def _text(x: float, y: float, content: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(content)}</text>'
