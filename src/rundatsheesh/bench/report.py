"""Results as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rundatsheesh.bench.measures import MEASURES, Goal
from rundatsheesh.bench.results import Judgement, Results, Row

TIMES = "\N{MULTIPLICATION SIGN}"
HEAD = ("measure", "n", "p50", "p95", "p99", "unit", "beside the bare")


def text(results: Results) -> str:
    """A table of every measure by group, then one of the goals."""
    lines = table([HEAD, *_grouped(results.rows())])
    judged = list(results.judgements())
    if judged:
        lines += ["", *table([("goal", "promised", "measured", ""), *map(_judged, judged)])]
        lines.append(f"{sum(judgement.met for judgement in judged)} of {len(judged)} goals met")
    return "\n".join(lines)


def as_json(results: Results, facts: Mapping[str, Any]) -> str:
    """Facts about the run, every sample, and what they come to."""
    measures = {
        row.measure.key: {
            "title": row.measure.title,
            "unit": row.measure.unit,
            **{name: _short(value) for name, value in asdict(row.summary).items()},
            "beside": row.measure.beside,
            "ratio": None if row.ratio is None else _short(row.ratio),
            "samples": [_short(sample) for sample in results.samples[row.measure.key]],
        }
        for row in results.rows()
    }
    goals = [
        {"measure": judged.goal.key, "promised": promise(judged.goal), "value": _short(judged.value), "met": judged.met}
        for judged in results.judgements()
    ]
    return json.dumps({**facts, "measures": measures, "goals": goals}, indent=1, ensure_ascii=False) + "\n"


def promise(goal: Goal) -> str:
    sign, limit = ("≤", goal.most) if goal.most is not None else ("≥", goal.least)
    if goal.beside is not None:
        return f"{sign} {limit:g} {TIMES} {MEASURES[goal.beside].title.removeprefix('bare: ')}"
    return f"{sign} {limit:g} {MEASURES[goal.key].unit}".rstrip()


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell; columns of numbers to the right. A row of one cell is a heading."""
    full = [row for row in rows if len(row) > 1]
    widths = [max(len(row[column]) for row in full) for column in range(len(full[0]))]
    right = [all(_is_number(row[column]) for row in full[1:]) for column in range(len(widths))]
    return [row[0] if len(row) == 1 else _line(row, widths, right) for row in rows]


def number(value: float) -> str:
    """Three digits that count."""
    if abs(value) >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _grouped(rows: Iterable[Row]) -> Iterable[tuple[str, ...]]:
    group = ""
    for row in rows:
        if row.measure.group != group:
            group = row.measure.group
            yield (group,)
        summary = row.summary
        numbers = (str(summary.count), number(summary.median), number(summary.p95), number(summary.p99))
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} {TIMES}"
        yield (f"  {row.measure.title}", *numbers, row.measure.unit, ratio)


def _judged(judgement: Judgement) -> tuple[str, ...]:
    goal = judgement.goal
    unit = TIMES if goal.beside is not None else MEASURES[goal.key].unit
    measured = f"{number(judgement.value)} {unit}".rstrip()
    return (MEASURES[goal.key].title, promise(goal), measured, "met" if judgement.met else "MISSED")


def _line(row: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    cells = [
        cell.rjust(width) if to_right else cell.ljust(width)
        for cell, width, to_right in zip(row, widths, right, strict=True)
    ]
    return "  ".join(cells).rstrip()


def _is_number(cell: str) -> bool:
    return cell.replace(".", "", 1).lstrip("-").isdigit()


def _short(value: float) -> float:
    return round(value, 3)
