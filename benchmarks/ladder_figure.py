"""The figure of a ladder: loss against bytes and against rounds, a pair of panels for each set of rows."""

from html import escape
from math import ceil, floor, log10

from kilotune.engine._svg import Axis, Series, line_chart, tick_text, ticks
from ladder_page import OURS, Rungs

SIZE = 600, 330
GAP = 11  # between numbers beside points
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
    heights = apart(places)
    for number, (point, (px, py), height) in enumerate(zip(points, places, heights, strict=True), start=1):
        style = "c1" if point.recipe == OURS else "c2" if point in rungs.frontier else ""
        hint = escape(f"{point.label}: loss {point.loss:.3f}, {point.bytes:,} B")
        body += f'<circle class="{style}" cx="{px:.1f}" cy="{py:.1f}" r="4"><title>{hint}</title></circle>'
        label, left = point.label if style else str(number), px > 0.75 * SIZE[0]
        label += " ↑" if point.loss > cap else ""
        body += text(px + (-7 if left else 7), height + 4, label, f"small {style} {'end' if left else ''}")
    return f'<svg viewBox="0 0 {SIZE[0]} {SIZE[1]}">{body}</svg>'


def apart(places: list[tuple[float, float]]) -> list[float]:
    """Heights of labels: those of points that lie near each other are moved down until none covers another."""
    heights: dict[int, float] = {}
    for index in sorted(range(len(places)), key=lambda i: places[i][1]):
        near = [height for i, height in heights.items() if abs(places[i][0] - places[index][0]) < 3 * GAP]
        heights[index] = max([places[index][1], *(height + GAP for height in near)])
    return [heights[index] for index in range(len(places))]


def curves(title: str, rungs: Rungs) -> str:
    """Loss against rounds, of all protocols in the rounds that most of them have; ours and the frontier by name."""
    named = [*rungs.frontier, *(p for p in rungs.points if p.recipe == OURS and p not in rungs.frontier)]
    series = []
    for point in sorted(rungs.points, key=lambda p: p in named):  # the named ones above the others
        style = "c1" if point.recipe == OURS else "c2" if point in named else "faint"
        seen = [
            (r, min(loss, rungs.cap)) for r, loss in point.result["curve"] if loss is not None and r <= rungs.rounds
        ]
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
