"""The report's page: style sheet and HTML pieces. Every text is escaped here, so callers pass plain strings."""

from collections.abc import Iterable, Sequence
from html import escape

Cell = str | int | float | None

STYLE = """
:root { color-scheme: light dark; --bg: #ffffff; --soft: #f4f5f3; --line: #dcdfda; --text: #1d2125; --muted: #586069;
  --c1: #1a5fa0; --c2: #a8480a; --warn: #8a5200; --warn-bg: #fdf3e0; }
@media screen and (prefers-color-scheme: dark) { :root { --bg: #15181b; --soft: #1e2226; --line: #353b41;
  --text: #e7e8e5; --muted: #a2abb4; --c1: #7db7f2; --c2: #f0a566; --warn: #f1c27d; --warn-bg: #2e2618; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 28px 20px 56px; background: var(--bg); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 40px 0 12px; }
p { margin: 0 0 10px; max-width: 72ch; }
.lead, .note, figcaption span, dt { color: var(--muted); }
.note { font-size: .875rem; }
.warn { background: var(--warn-bg); color: var(--warn); border-left: 4px solid currentColor; padding: 10px 14px;
  margin: 14px 0; max-width: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(168px, 1fr)); gap: 10px; margin: 22px 0 0; }
.cards div { background: var(--soft); border-radius: 8px; padding: 11px 13px; }
.cards dt { font-size: .8125rem; }
.cards dd { margin: 2px 0 0; font-size: 1.15rem; font-weight: 600; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.cards dd small { display: block; font-size: .8125rem; font-weight: 400; color: var(--muted); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 28px 32px; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: 6px; }
figcaption span { display: block; font-weight: 400; font-size: .875rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 12px; fill: var(--text); font-variant-numeric: tabular-nums; }
svg .tick { fill: var(--muted); }
svg .middle { text-anchor: middle; } svg .end { text-anchor: end; }
svg .label { font-weight: 600; font-size: 13px; } svg .small { font-size: 12px; font-weight: 400; }
svg .label { paint-order: stroke; stroke: var(--bg); stroke-width: 3px; stroke-linejoin: round; }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .zero { stroke: var(--muted); stroke-width: 1; }
svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg polyline.c1, svg line.c1 { stroke: var(--c1); } svg polyline.c2 { stroke: var(--c2); }
svg polyline.faint { stroke: var(--muted); stroke-width: 1; opacity: .5; }
svg line.thick { stroke-width: 3; opacity: .45; }
svg circle.c1, svg rect.c1, svg text.c1 { fill: var(--c1); }
svg circle.c2, svg rect.c2, svg text.c2 { fill: var(--c2); }
svg circle.hollow { fill: var(--bg); stroke: var(--c1); stroke-width: 2; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; min-width: 50%; }
th, td { padding: 5px 18px 5px 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--muted); font-weight: 500; white-space: nowrap; vertical-align: bottom; }
tbody th { font-weight: 500; }
.n { text-align: right; } .n, .short { white-space: nowrap; } .long { min-width: 240px; }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 18px; margin: 0;
  font-size: .9375rem; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: .875rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--soft); border-radius: 8px; padding: 12px 14px; overflow-x: auto; margin: 6px 0 14px; }
details { margin: 14px 0; } summary { cursor: pointer; font-weight: 600; margin-bottom: 8px; }
footer { margin-top: 44px; font-size: .875rem; color: var(--muted); }
@media (max-width: 520px) { body { padding: 18px 14px 40px; } h1 { font-size: 1.4rem; }
  .cards { grid-template-columns: 1fr 1fr; } .cards dd { font-size: 1rem; }
  .facts { grid-template-columns: 1fr; } .facts dd { margin-bottom: 6px; }
  svg text { font-size: 13px; } svg .label { font-size: 13.5px; } svg .small { font-size: 13px; } }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } .charts { grid-template-columns: 1fr 1fr; }
  figure, .cards div, tr { break-inside: avoid; } h2 { break-after: avoid; } pre { white-space: pre-wrap; }
  .scroll { overflow: visible; } details::details-content { content-visibility: visible; display: block; } }
"""


def page(title: str, body: str) -> str:
    """One file that loads nothing: the browser is told to refuse everything but its own style sheet."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def section(heading: str, body: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>\n{body}</section>\n" if body else ""


def heading(text: str) -> str:
    return f"<h1>{escape(text)}</h1>\n"


def note(text: str, style: str = "note") -> str:
    return f'<p class="{style}">{escape(text)}</p>\n' if text else ""


def cards(items: Iterable[tuple[str, str, str]]) -> str:
    """Headline numbers: (name, number, what to add in small)."""
    parts = []
    for name, number, small in items:
        added = f"<small>{escape(small)}</small>" if small else ""
        parts.append(f"<div><dt>{escape(name)}</dt><dd>{escape(number)}{added}</dd></div>")
    return f'<dl class="cards">{"".join(parts)}</dl>\n' if parts else ""


def facts(items: Iterable[tuple[str, str]]) -> str:
    parts = [f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in items]
    return f'<dl class="facts">{"".join(parts)}</dl>\n' if parts else ""


def figure(caption: str, below: str, svg: str) -> str:
    if not svg:
        return ""
    return f"<figure><figcaption>{escape(caption)}<span>{escape(below)}</span></figcaption>{svg}</figure>\n"


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], text_columns: int = 1) -> str:
    """A table whose first column names the row; columns after `text_columns` are numbers, aligned right.
    A column without any value is left out."""
    if not rows:
        return ""
    kept = [index for index in range(len(columns)) if any(row[index] is not None for row in rows)]
    columns, rows = [columns[index] for index in kept], [[row[index] for index in kept] for row in rows]
    head = "".join(
        f'<th scope="col"{_align(index, text_columns)}>{escape(name)}</th>' for index, name in enumerate(columns)
    )
    body = ""
    for row in rows:
        cells = [f'<th scope="row"{_align(0, text_columns)}>{escape(cell_text(row[0]))}</th>']
        cells += [
            f"<td{_align(index, text_columns)}>{escape(cell_text(cell))}</td>" for index, cell in enumerate(row[1:], 1)
        ]
        body += f"<tr>{''.join(cells)}</tr>\n"
    return (
        f'{note(caption)}<div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
    )


def details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>\n{body}</details>\n" if body else ""


def code(text: str) -> str:
    return f"<pre><code>{escape(text)}</code></pre>\n"


def cell_text(cell: Cell) -> str:
    """Integers in full, with commas; other numbers with three decimals; nothing as a dash."""
    if cell is None:
        return "–"
    if isinstance(cell, int):
        return f"{cell:,}"
    return number(cell) if isinstance(cell, float) else cell


def number(value: float) -> str:
    return f"{value:.3f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _align(index: int, text_columns: int) -> str:
    """Numbers to the right; of several text columns only the last may be long and wrap."""
    if index >= text_columns:
        return ' class="n"'
    if text_columns == 1:
        return ""
    return ' class="short"' if index + 1 < text_columns else ' class="long"'
