"""The report's arithmetic as pure functions: summaries over seeds, paired verdicts, bands, costs.

S seeds, U meta-training updates, K decisions. Of bits per byte, seconds and tokens, less is better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MIN_SEEDS = 3  # fewer show nothing about a difference


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation of n values; None where there are too few to have one."""

    mean: float | None
    std: float | None
    n: int


def summarize(values: Sequence[float]) -> Summary:
    """(S,) -> their summary. A value that is not finite (a run that diverged) makes the mean not finite either."""
    x = np.asarray(values, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return Summary(float(x.mean()) if len(x) else None, float(x.std(ddof=1)) if len(x) > 1 else None, len(x))


# -----------------------------------------------------------------------------
# one method against another


@dataclass(frozen=True)
class Comparison:
    """Ours minus theirs over the seeds that both have; `relative` is the difference of the means over their mean."""

    difference: float | None
    standard_error: float | None
    relative: float | None
    n: int
    verdict: str


def compare(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Comparison:
    """Values by seed -> the paired comparison of them, with its verdict."""
    seeds = sorted(ours.keys() & theirs.keys())
    a, b = np.array([ours[s] for s in seeds]), np.array([theirs[s] for s in seeds])
    with np.errstate(invalid="ignore"):
        difference = summarize(a - b)
        relative = relative_change(float(a.mean()), float(b.mean())) if seeds else None
    error = difference.std / math.sqrt(difference.n) if difference.std is not None else None
    return Comparison(difference.mean, error, relative, difference.n, verdict(difference.mean, error, difference.n))


def verdict(difference: float | None, standard_error: float | None, n: int) -> str:
    """ "better" or "worse" if the paired difference of at least 3 seeds exceeds twice its standard error."""
    if n == 0:
        return "not measured"
    if not math.isfinite(difference):
        return "diverged"
    if n < MIN_SEEDS:
        return "too few seeds"
    if abs(difference) <= 2 * standard_error:
        return "no difference shown"
    return "better" if difference < 0 else "worse"


def relative_change(ours: float, theirs: float) -> float:
    """`ours / theirs - 1`: -0.025 is 2.5% less than theirs."""
    return ours / theirs - 1


# -----------------------------------------------------------------------------
# figures


def mean_curve(curves: Sequence[Mapping[int, float]]) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
    """Curves by step, one a seed -> the steps that all of them have, with mean, minimum and maximum there."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = np.array([[curve[step] for step in steps] for curve in curves])  # (S, steps)
    return steps, values.mean(0), values.min(0), values.max(0)


def quartiles(values: Sequence[Sequence[float]]) -> np.ndarray:
    """(U, K) -> (3, K): the 25th percentile, the median and the 75th over the updates."""
    return np.percentile(np.asarray(values, dtype=np.float64), [25, 50, 75], axis=0)


# -----------------------------------------------------------------------------
# costs


def ratio(part: float | None, whole: float | None) -> float | None:
    """`part / whole`; None where either has not been measured or the whole is 0."""
    return part / whole if part is not None and whole else None


def total(values: Sequence[float | None]) -> float | None:
    """The sum; None if there is nothing, or any of it has not been measured."""
    return sum(values) if values and None not in values else None
