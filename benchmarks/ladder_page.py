"""What the runs of a ladder come to: points, the frontier, and the table of one set of rows."""

from dataclasses import dataclass
from math import inf
from typing import Any

from results import table as markdown

OURS = "kilotune"


def loss_of(result: dict[str, Any]) -> float:
    """Held-out loss; infinite when the model is no longer finite."""
    loss = result["after"]["loss"]
    return inf if loss is None else float(loss)


@dataclass(frozen=True)
class Point:
    """A protocol on the ladder."""

    label: str
    recipe: str
    result: dict[str, Any]

    @property
    def bytes(self) -> int:
        return int(self.result["bytes"])

    @property
    def loss(self) -> float:
        return loss_of(self.result)

    def below(self, other: "Point") -> bool:
        """A lower loss for as many bytes or fewer, or the same loss for fewer."""
        cheaper = self.bytes < other.bytes and self.loss <= other.loss
        return cheaper or (self.bytes <= other.bytes and self.loss < other.loss)


@dataclass(frozen=True)
class Rungs:
    """The ladder of one set of rows, by bytes."""

    points: list[Point]
    references: dict[str, tuple[float, float | None]]  # base, alone, centralised -> (loss, exact match)
    errors: dict[str, str]
    missing: list[str]
    rounds: int

    @property
    def cap(self) -> float:
        """The highest loss that is drawn: what has diverged would squeeze all others."""
        return 1.1 * self.references["base"][0]

    @property
    def frontier(self) -> list[Point]:
        return [point for point in self.points if not any(other.below(point) for other in self.points)]

    def verdicts(self) -> list[str]:
        """Whether any other protocol beats ours at its bytes or fewer."""
        told = []
        for ours in (point for point in self.points if point.recipe == OURS):
            rivals = [p for p in self.points if p.recipe != OURS and p.bytes <= ours.bytes]
            better = [f"`{p.label}` (loss {p.loss:.3f} for {p.bytes:,} B)" for p in rivals if p.loss < ours.loss]
            verdict = f"None of the {len(rivals)} protocols with as many bytes or fewer beats it."
            if better:
                verdict = f"Beaten at its bytes or fewer by {', '.join(better)}."
            told.append(f"**`{ours.label}`**: loss {ours.loss:.3f} for {ours.bytes:,} B. {verdict}")
        return told

    def lines(self) -> list[str]:
        """Markdown: the table, the verdicts, what failed and what was not run."""
        columns = ["#", "protocol", "bytes per client", "up, a round", "down, a round", "rounds", "loss", "exact match"]
        columns += ["peak memory (GiB)"]
        first = [
            ["", name, *[""] * 4, f"{loss:.3f}", percent(exact), ""] for name, (loss, exact) in self.references.items()
        ]
        rows = [[str(number), *self._cells(point)] for number, point in enumerate(self.points, start=1)]
        notes = [f"- {text}" for text in self.verdicts()]
        notes += [f"- `{label}` failed: {why}" for label, why in self.errors.items()]
        notes += [f"- Not run: {', '.join(f'`{label}`' for label in self.missing)}."] if self.missing else []
        return [*markdown(columns, [*first, *rows]), "", *notes]

    def _cells(self, point: Point) -> list[str]:
        result, name = point.result, f"**{point.label}**" if point.recipe == OURS else point.label
        cells = [name + (" \\*" if point in self.frontier else ""), f"{point.bytes:,}"]
        cells += [f"{result['up']:,.0f}", f"{result['down']:,.0f}", str(result["rounds"])]
        cells += [f"{point.loss:.3f}", percent(result["after"]["exact_match"])]
        return [*cells, f"{result['peak_rss_bytes'] / 2**30:.2f}"]


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
