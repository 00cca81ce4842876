"""What a run has measured so far, and whether it keeps what is promised."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from rundatsheesh.bench.measures import GOALS, MEASURES, Goal, Measure
from rundatsheesh.bench.stats import Summary, median, summarize


@dataclass(frozen=True, slots=True)
class Row:
    measure: Measure
    summary: Summary
    ratio: float | None  # of its median to that of the measure beside it, where that was taken


@dataclass(frozen=True, slots=True)
class Judgement:
    goal: Goal
    value: float  # what the goal is about: the median, or its ratio
    met: bool


class Results:
    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """One sample each. The keys are those of MEASURES."""
        for key, value in values.items():
            if key not in MEASURES:
                raise KeyError(f"not a measure: {key}")
            self.samples.setdefault(key, []).append(value)

    def median(self, key: str) -> float | None:
        taken = self.samples.get(key)
        return median(taken) if taken else None

    def ratio(self, key: str, beside: str | None) -> float | None:
        """None where either was not measured, or there is nothing to divide by."""
        value, other = self.median(key), self.median(beside) if beside is not None else None
        return value / other if value is not None and other else None

    def rows(self) -> Iterator[Row]:
        """What was measured, in the order of MEASURES."""
        for key, measure in MEASURES.items():
            if taken := self.samples.get(key):
                yield Row(measure, summarize(taken), self.ratio(key, measure.beside))

    def judgements(self, goals: Iterable[Goal] = GOALS) -> Iterator[Judgement]:
        """Of the goals about something that was measured."""
        for goal in goals:
            value = self.median(goal.key) if goal.beside is None else self.ratio(goal.key, goal.beside)
            if value is not None:
                yield Judgement(goal, value, goal.holds(value))
