"""Display: a run's events on stderr, live in a terminal, one line each in a log. stdout is left to results.

In a terminal: lines that stay (clients, evaluations, warnings), below them the last rounds, what is going on, and a
bar with the time left. Elsewhere: plain lines, at most one of the frequent kinds per 10 s.
"""

import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from kilotune.core.lines import clean
from kilotune.core.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live
    from rich.table import Table

Event = dict[str, Any]

LAST_ROWS = 6
PROGRESS_EVERY_S = 10.0
SAME_LINES = 12
PACE_OVER = 8
BAR_WIDTH = 28
LOCAL_STEP = re.compile(r"round (\d+) step (\d+)/(\d+)")
STATUSES = {"joined": "joined", "refused": "refused", "missing": "no answer", "error": "failed"}
STYLES = {"refused": "red", "error": "red", "missing": "yellow", "joined": "green"}


class Display:
    """Shows events: `with Display(total, "round") as emit: ... emit(event)`."""

    def __init__(
        self,
        total: int | None,
        unit: str = "round",
        quiet: bool = False,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`total` counts `unit`s (round, step); None: the end is not known. `file` is stderr unless given."""
        self.total, self.unit, self.quiet = total, unit, quiet
        self._file = sys.stderr if file is None else file
        self._clock = clock
        self._live: Live | None = None
        self._started = clock()
        self._spoke = float("-inf")
        self._done = 0
        self._activity = ""
        self._within: tuple[int, int] | None = None  # (done, total) of the current activity
        self._steps_per_round = 0
        self._told = "loss"
        self._marks: deque[tuple[float, int]] = deque(maxlen=PACE_OVER)
        self._rows: deque[list[str]] = deque(maxlen=LAST_ROWS)
        self._same: tuple[str, int] = ("", 0)

    def __enter__(self) -> "Display":
        self._started = self._clock()
        if not self.quiet and self._file.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._file, highlight=False)
            self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush_same()
        if self._live is not None:
            self._activity, self._within = "", None
            self._marks.clear()
            self._live.stop()
            self._live = None

    def __call__(self, event: Event) -> None:
        if self.quiet:
            return
        if not (event["event"] == "client" and event.get("status") == self._same[0]):
            self._flush_same()
        handler = getattr(self, f"_on_{event['event']}", None)  # events this display does not know are not shown
        if handler is not None:
            handler(event)

    # -- events -----------------------------------------------------------------------------------------------

    def _on_status(self, event: Event) -> None:
        self._activity, self._within = clean(event["text"]), None
        if self._live is None:
            self._line(self._activity)

    def _on_progress(self, event: Event) -> None:
        self._activity = clean(event["what"])
        self._within = (event["done"], event["total"]) if "total" in event else None
        if local := LOCAL_STEP.search(self._activity):
            number, step, self._steps_per_round = map(int, local.groups())
            finished = number - 1 if self.unit == "round" else (number - 1) * self._steps_per_round + step
            self._advance(finished)
        if self._live is None:
            self._rarely(self._activity + (f" {self._within[0]}/{self._within[1]}" if self._within else ""))

    def _on_clients(self, event: Event) -> None:
        counts = sorted(event["rows"].values())
        if not counts:
            return
        spread = f", {counts[0]:,} to {counts[-1]:,} each" if len(counts) > 1 else ""
        plural = "" if len(counts) == 1 else "s"
        self._line(f"{len(counts):,} client{plural} with {sum(counts):,} training rows{spread}")

    def _on_client(self, event: Event) -> None:
        status = event["status"]
        if status not in STATUSES:
            return
        count = self._same[1] + 1 if self._same[0] == status else 1
        self._same = (status, count)
        if count <= SAME_LINES:
            where = f"round {event['round']}: " if "round" in event else ""
            why = f": {clean(event['why'])}" if event.get("why") else ""
            self._line(f"{where}client {clean(event['client'])} {STATUSES[status]}{why}", STYLES[status])

    def _on_round(self, event: Event) -> None:
        number = event["round"]
        self._advance(number if self.unit == "round" else number * self._steps_per_round)
        clients, asked = event["clients"], event["asked"]
        up, down = human_bytes(event["up_bytes"] / max(1, clients)), human_bytes(event["down_bytes"] / max(1, asked))
        took = human_seconds(event["seconds"])
        # With privacy the loss is not told; what has been spent is.
        key = "loss" if "loss" in event else "epsilon"
        told = f"{event[key]:.3f}" if key in event else "–"
        self._rows.append([str(number), f"{clients}/{asked}", told, up, down, took])
        self._told = key
        if self._live is None:
            of = f"/{self.total}" if self.total and self.unit == "round" else ""
            self._line(
                f"round {number}{of}: {clients} of {asked} clients, {key} {told}, "
                f"{up} up and {down} down per client, {took}{self._left(', ')}"
            )

            if added := event.get("secure"):
                self._line(
                    f"round {number}{of}: secure aggregation added {human_bytes(added['added_up_bytes'])} up, "
                    f"{human_bytes(added['added_down_bytes'])} down and {human_seconds(added['seconds'])} in all"
                )

    def _on_step(self, event: Event) -> None:
        self._advance(event["step"])
        rate = event["tokens"] / max(event["seconds"], 1e-9)
        self._rows.append([str(event["step"]), f"{event['loss']:.3f}", f"{rate:,.0f}", human_seconds(event["seconds"])])
        if self._live is None:
            of = f"/{self.total}" if self.total else ""
            line = f"step {event['step']}{of}: loss {event['loss']:.3f}{self._left(', ')}"
            self._rarely(line, always=event["step"] == self.total)

    def _on_evaluation(self, event: Event) -> None:
        unit = "step" if "step" in event else "round"
        number = event.get(unit, 0)
        figures = event["overall"]
        readings = []
        if figures.get("loss") is not None:
            readings.append(f"loss {figures['loss']:.3f}")
        for key, name in (("exact_match", "exact match"), ("rouge_l", "ROUGE-L")):
            if figures.get(key) is not None:
                readings.append(f"{name} {100 * figures[key]:.0f} %")
        if (emulator := (event.get("emulator") or {}).get("loss")) is not None:
            readings.append(f"the clients' emulator {emulator:.3f}")
        where = f"{unit} {number}" if number else "before training"
        self._activity, self._within = "", None
        self._line(f"{where}: {', '.join(readings) or 'nothing to measure on'}", "bold")

    def _on_truncated(self, event: Event) -> None:
        who, cut, rows = clean(event["who"]), event["cut"], event["rows"]
        self._line(f"{who}: {cut:,} of {rows:,} rows are longer than data.max_length and were cut", "yellow")

    def _on_resumed(self, event: Event) -> None:
        at = next((f" after {unit} {event[unit]}" for unit in ("step", "round") if unit in event), "")
        self._line(f"resumed{at}")
        self._marks.clear()
        self._done = max(self._done, event.get(self.unit, 0))

    def _on_warning(self, event: Event) -> None:
        self._line(f"warning: {clean(event['text'])}", "yellow")

    def _on_rejected(self, event: Event) -> None:
        self._line(f"round {event['round']} changes nothing: {clean(event['why'])}", "yellow")

    def _on_stopped(self, event: Event) -> None:
        self._line(f"stopped early: {clean(event['why'])}", "yellow")

    def _on_page(self, event: Event) -> None:
        self._line(clean(event["text"]))

    def _on_stopping(self, event: Event) -> None:
        self._line(f"{event['why']}: stopping after this {self.unit}; once more to stop at once", "yellow")

    def _on_end(self, event: Event) -> None:
        self._activity, self._within = "", None

    # -- lines ------------------------------------------------------------------------------------------------

    def _line(self, text: str, style: str = "") -> None:
        """One line that stays."""
        if self._live is None:
            self._file.write(text + "\n")
            self._file.flush()
            self._spoke = self._clock()
        else:
            from rich.text import Text

            self._live.console.print(Text(text, style=style))

    def _rarely(self, text: str, always: bool = False) -> None:
        if always or self._clock() - self._spoke >= PROGRESS_EVERY_S:
            self._line(text)

    def _flush_same(self) -> None:
        status, count = self._same
        self._same = ("", 0)
        if count > SAME_LINES:
            self._line(f"… and {count - SAME_LINES:,} more: {STATUSES[status]}", STYLES[status])

    # -- time and pictures ------------------------------------------------------------------------------------

    def _advance(self, done: int) -> None:
        if done > self._done or not self._marks:
            self._done = max(done, self._done)
            self._marks.append((self._clock(), self._done))

    def _left(self, before: str = "") -> str:
        """Time left at the pace of the last units, evaluations among them included."""
        if not self.total or len(self._marks) < 2 or self._done >= self.total:
            return ""
        (first, start), (last, end) = self._marks[0], self._marks[-1]
        left = (last - first) / (end - start) * (self.total - end) - (self._clock() - last)
        return f"{before}{human_seconds(max(0.0, left))} left"

    def _render(self) -> "Group":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        parts: list[Any] = [self._last_rows()] if self._rows else []
        done, total, unit = self._done, self.total, self.unit
        if not total and self._within is not None:
            done, total, unit = *self._within, ""
        elif self._activity:
            within = f" {self._within[0]}/{self._within[1]}" if self._within else ""
            parts.append(Text(self._activity + within, style="dim", no_wrap=True, overflow="ellipsis"))
        elapsed = human_seconds(self._clock() - self._started)
        bar = Table.grid(padding=(0, 1))
        if total:
            counted = f"{unit} {done}/{total}".strip() if unit else f"{self._activity} {done}/{total}"
            bar.add_row(counted, ProgressBar(total, done, width=BAR_WIDTH), elapsed, self._left())
            parts.append(bar)
        elif self._activity:
            bar.add_row(ProgressBar(width=BAR_WIDTH, pulse=True, animation_time=self._clock()), elapsed)
            parts.append(bar)
        return Group(*parts)

    def _last_rows(self) -> "Table":
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        rounds = ["round", "clients", self._told, "up/client", "down/client", "time"]
        rows = list(self._rows)
        table = Table(box=SIMPLE_HEAD, header_style="dim", pad_edge=False)
        for name in rounds if len(rows[0]) == len(rounds) else ["step", "loss", "tokens/s", "time"]:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*row)
        return table
