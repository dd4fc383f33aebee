"""Means, deviations and the interval of a paired difference."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from scipy.stats import t  # type: ignore[import-untyped]


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def paired(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> Interval:
    """Student's interval of the mean of first - second over pairs; endless for a single pair."""
    differences = [one - other for one, other in zip(first, second, strict=True)]
    mean, count = fmean(differences), len(differences)
    if count < 2:
        return Interval(mean, -math.inf, math.inf)
    half = t.ppf((1 + level) / 2, count - 1) * stdev(differences) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def show_interval(interval: Interval, digits: int) -> str:
    """As a table's cell; without bounds where there are none."""
    mean, low, high = (f"{value:+.{digits}f}" for value in interval)
    return mean if math.isinf(interval.low) else f"{mean} [{low}, {high}]"


def show_spread(values: Sequence[float | None], digits: int) -> str:
    """Mean and standard deviation; "-" where nothing was measured."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ± {stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{fmean(known):.{digits}f}{spread}"
