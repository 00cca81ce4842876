"""A handful of numbers about many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Summary:
    """Of at least one sample, in the samples' unit."""

    count: int
    median: float
    p95: float
    p99: float
    least: float
    most: float


def percentile(samples: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the samples lie, between neighbours by distance. Of a small number of
    samples the high percentiles are close to the largest. Raises ValueError without samples."""
    if not samples:
        raise ValueError("no samples")
    if not 0 <= share <= 1:
        raise ValueError(f"not a share: {share}")
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def median(samples: Sequence[float]) -> float:
    return percentile(samples, 0.5)


def summarize(samples: Sequence[float]) -> Summary:
    return Summary(
        count=len(samples),
        median=median(samples),
        p95=percentile(samples, 0.95),
        p99=percentile(samples, 0.99),
        least=min(samples),
        most=max(samples),
    )
