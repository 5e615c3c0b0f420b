"""The figure of a ladder: loss against bytes and against rounds, a pair of panels for each set of rows."""

from html import escape
from math import ceil, floor, log10

from kilotune.engine.reporting._svg import Axis, Series, line_chart, tick_text, ticks
from ladder_page import OURS, Rungs

SIZE = 600, 330
GAP = 11  # between labels beside points
LETTER = 6  # width of a small letter, on the generous side
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1d2125}.small{font-size:10px}.middle{text-anchor:middle}"
    ".end{text-anchor:end}.grid{stroke:#dcdfda}line.across,polyline.across{stroke:#78807a;stroke-dasharray:5 4}"
    "polyline{fill:none;stroke-width:2}circle{fill:#9aa39c}.c1{stroke:#1a5fa0}circle.c1{fill:#1a5fa0}.c2{stroke:#a8480a}"
    "circle.c2{fill:#a8480a}text.c1,text.c2{stroke:none}text.c1{fill:#1a5fa0;font-weight:bold}text.c2{fill:#a8480a}"
    ".faint{stroke:#c9cec9;stroke-width:1}.title{font-weight:bold}"
)


def scatter(title: str, rungs: Rungs) -> str:
    """Loss against bytes (logarithmic); ours and the frontier by name, all others by their number in the table."""
    points, cap = rungs.points, rungs.cap
    losses = [min(point.loss, cap) for point in points] + [loss for loss, _ in rungs.references.values()]
    marks_y = ticks(min(losses), max(losses))
    low, high = floor(log10(points[0].bytes)), ceil(log10(points[-1].bytes + 1))
    marks_x = tuple(float(n) for n in range(low, high + 1))
    x, y = Axis(marks_x, low, high, 48, SIZE[0] - 40), Axis(marks_y, marks_y[0], marks_y[-1], SIZE[1] - 40, 30)
    told = tick_text(marks_y)
    body = text(48, 16, title, "title") + text(x.end, SIZE[1] - 6, "bytes per client, up and down", "end")
    for tick in marks_x:
        body += line(x.at(tick), y.start, x.at(tick), y.end, "grid")
        body += text(x.at(tick), y.start + 17, size(int(10**tick)), "middle")
    for tick in marks_y:
        body += line(x.start, y.at(tick), x.end, y.at(tick), "grid") + text(41, y.at(tick) + 4, told(tick), "end")
    for name, (loss, _) in rungs.references.items():
        body += line(x.start, y.at(loss), x.end, y.at(loss), "across")
        body += text(x.start + 4, y.at(loss) - 3, name, "small")
    places = [(x.at(log10(point.bytes)), y.at(min(point.loss, cap))) for point in points]
    styles = ["c1" if point.recipe == OURS else "c2" if point in rungs.frontier else "" for point in points]
    for point, (px, py), style in zip(points, places, styles, strict=True):
        hint = escape(f"{point.label}: loss {point.loss:.3f}, {point.bytes:,} B")
        body += f'<circle class="{style}" cx="{px:.1f}" cy="{py:.1f}" r="4"><title>{hint}</title></circle>'
    words = {(at,): point.label for at, (point, style) in enumerate(zip(points, styles, strict=True)) if style}
    words |= {
        group: numbers(group) for group in together(places, [at for at in range(len(points)) if (at,) not in words])
    }
    boxes = []
    for group, label in words.items():
        px, width = places[group[0]][0], LETTER * len(label)
        left = px > 0.75 * SIZE[0]
        boxes.append((px - 7 - width if left else px + 7, width, places[group[0]][1], left))
    for (group, label), (start, width, _, left), height in zip(words.items(), boxes, apart(boxes), strict=True):
        label += " ↑" if points[group[0]].loss > cap else ""
        anchor = start + width if left else start
        body += text(anchor, height + 4, label, f"small {styles[group[0]]} {'end' if left else ''}")
    return f'<svg viewBox="0 0 {SIZE[0]} {SIZE[1]}">{body}</svg>'


def together(places: list[tuple[float, float]], which: list[int]) -> list[tuple[int, ...]]:
    """Points that lie on each other share a label."""
    groups: list[list[int]] = []
    for at in which:
        near = (
            g for g in groups if max(abs(places[g[0]][0] - places[at][0]), abs(places[g[0]][1] - places[at][1])) < GAP
        )
        if (group := next(near, None)) is None:
            groups.append([at])
        else:
            group.append(at)
    return [tuple(group) for group in groups]


def numbers(group: tuple[int, ...]) -> str:
    """Their numbers in the table, runs of three or more shortened: 3, 7–10."""
    runs: list[list[int]] = []
    for number in (at + 1 for at in group):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def apart(boxes: list[tuple[float, float, float, bool]]) -> list[float]:
    """Heights of labels (start, width, height, _): moved down until none covers another."""
    heights: dict[int, float] = {}
    for index in sorted(range(len(boxes)), key=lambda i: boxes[i][2]):
        start, width, wanted, _ = boxes[index]
        beside = [h for i, h in heights.items() if boxes[i][0] < start + width and start < boxes[i][0] + boxes[i][1]]
        height = wanted
        for other in sorted(beside):
            height = max(height, other + GAP) if abs(other - height) < GAP else height
        heights[index] = height
    return [heights[index] for index in range(len(boxes))]


def curves(title: str, rungs: Rungs) -> str:
    """Loss against rounds, of all protocols with as many rounds as most; ours and the frontier by name."""
    points = [point for point in rungs.points if point.result["rounds"] == rungs.rounds]
    named = [point for point in points if point in rungs.frontier or point.recipe == OURS]
    series = []
    for point in sorted(points, key=lambda p: p in named):  # the named ones above the others
        style = "c1" if point.recipe == OURS else "c2" if point in named else "faint"
        seen = [(r, min(loss, rungs.cap)) for r, loss in point.result["curve"] if loss is not None]
        series.append(Series(point.label, seen, style))
    for name, (loss, _) in rungs.references.items():
        series.append(Series(name, [(0, loss), (rungs.rounds, loss)], "across"))
    chart = line_chart(title, series, "round", lambda v: f"{v:.3f}", whole_x=True)
    # Room above for a title of the same height as the one beside it.
    return chart.replace('viewBox="0 0 480 264"', 'viewBox="0 -18 480 282"').replace(
        "</svg>", text(48, -6, title, "title") + "</svg>"
    )


def sheet(panels: list[str]) -> str:
    """All panels as one figure, two beside each other."""
    width, height = SIZE
    placed = "".join(
        panel.replace(
            "<svg ", f'<svg x="{index % 2 * width}" y="{index // 2 * height}" width="{width}" height="{height}" ', 1
        )
        for index, panel in enumerate(panels)
    )
    total = f"{2 * width} {ceil(len(panels) / 2) * height}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total}"><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{placed}</svg>\n'
    )


def size(amount: int) -> str:
    """A power of ten in words: 1 B, 10 kB, 100 MB."""
    unit = min((len(str(amount)) - 1) // 3, 4)
    return f"{amount // 1000**unit} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"


def text(x: float, y: float, content: str, style: str) -> str:
    return f'<text class="{style.strip()}" x="{x:.1f}" y="{y:.1f}">{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
