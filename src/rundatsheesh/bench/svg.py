"""Results as a picture: a bar for each median, a line on to its p95, the bare runtime's bars in grey."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby

from rundatsheesh.bench.report import TIMES, number
from rundatsheesh.bench.results import Results, Row

WIDTH = 860
LABELS = 290  # of the width, for the names
NUMBERS = 150  # of the width, for what stands behind the bars
BAR = 14
STEP = 22
HEAD = 34
MARGIN = 16
BARE = "bare: "
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2933 }
.title { font-size: 15px; font-weight: 600 }
.group { font-weight: 600 }
.ours { fill: #2563eb } .bare { fill: #9aa5b1 } .tail { stroke: #52606d }
@media (prefers-color-scheme: dark) { svg { background: #11161c } text { fill: #e4e7eb } .tail { stroke: #cbd2d9 } }
"""


@dataclass
class _Drawing:
    """Elements from top to bottom."""

    parts: list[str] = field(default_factory=list)
    y: int = MARGIN

    def text(self, x: float, label: str, *, kind: str = "", anchor: str = "start") -> None:
        self.parts.append(
            f'<text x="{x:.1f}" y="{self.y + BAR - 3}" class="{kind}" text-anchor="{anchor}">{escape(label)}</text>'
        )

    def bar(self, width: float, tail: float, kind: str) -> None:
        middle = self.y + BAR / 2
        self.parts.append(f'<rect x="{LABELS}" y="{self.y}" width="{width:.1f}" height="{BAR}" rx="2" class="{kind}"/>')
        if tail > width:
            self.parts.append(f'<path d="M{LABELS + width:.1f} {middle}H{LABELS + tail:.1f}" class="tail"/>')


def picture(results: Results, title: str, subtitle: str) -> str:
    """An SVG document. Measures without a unit of their own kind are drawn against the largest of their group and
    unit, so that bars side by side compare."""
    drawing = _Drawing()
    drawing.text(MARGIN, title, kind="title")
    drawing.y += STEP
    drawing.text(MARGIN, subtitle)
    drawing.y += STEP
    for (group, unit), rows in groupby(results.rows(), lambda row: (row.measure.group, row.measure.unit)):
        _draw_group(drawing, f"{group}, {unit}" if unit else group, list(rows))
    height = drawing.y + MARGIN
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
    return "\n".join([head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", *drawing.parts, "</svg>", ""])


def _draw_group(drawing: _Drawing, heading: str, rows: Sequence[Row]) -> None:
    drawing.y += HEAD - STEP
    drawing.text(MARGIN, heading, kind="group")
    drawing.y += STEP
    largest = _largest(rows)

    def width(value: float) -> float:
        return max(value, 0) / largest * (WIDTH - LABELS - NUMBERS)

    for row in rows:
        summary = row.summary
        is_bare = row.measure.title.startswith(BARE)
        drawing.text(LABELS - 8, row.measure.title.removeprefix(BARE), anchor="end")
        drawing.bar(width(summary.median), width(summary.p95), "bare" if is_bare else "ours")
        ratio = "" if row.ratio is None else f"  ({row.ratio:.2f} {TIMES} bare)"
        drawing.text(LABELS + width(max(summary.median, summary.p95)) + 6, number(summary.median) + ratio)
        drawing.y += STEP


def _largest(rows: Iterable[Row]) -> float:
    return max((max(row.summary.median, row.summary.p95) for row in rows), default=0) or 1
