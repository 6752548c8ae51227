"""The report's arithmetic as pure functions: summaries over seeds, paired verdicts, bands for figures, costs.

S seeds, P policies, K decisions. Of bits per byte, seconds and FLOPs, less is better.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MIN_SEEDS = 5  # with fewer, no verdict
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation of n values; None where there are too few values."""

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


def t_two_sided(t: float, df: int) -> float:
    """P(|T| < t) for Student's t with a whole number of degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan2(t, math.sqrt(df))
    cos, sin = math.cos(angle), math.sin(angle)
    odd = df % 2
    term, series = (cos, 0.0) if odd else (1.0, 0.0)
    for i in range(df // 2):  # odd df: cos + 2/3 cos^3 + ...; even df: 1 + 1/2 cos^2 + ...
        series += term
        term *= cos * cos * (2 * i + 1 + odd) / (2 * i + 2 + odd)
    return 2 / math.pi * (angle + sin * series) if odd else sin * series


@functools.cache
def t_quantile(df: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| < t) = `confidence`, by bisection: 2.776 for 4 degrees of freedom and 0.95.

    Raises `ValueError` for df < 1 or a confidence outside (0, 1).
    """
    if df < 1 or not 0 < confidence < 1:
        raise ValueError(f"no t quantile for df {df} and confidence {confidence}")
    low, high = 0.0, 1.0
    while t_two_sided(high, df) < confidence:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_two_sided(middle, df) < confidence else (low, middle)
    return high


@dataclass(frozen=True)
class Comparison:
    """Ours minus theirs over the n seeds that both have.

    `difference` and `std` are the mean and the standard deviation of the paired differences, `interval` the 95%
    interval of their mean by Student's t (None for n < 2), `relative` the difference of the means over their mean.
    """

    difference: float | None
    std: float | None
    interval: tuple[float, float] | None
    relative: float | None
    n: int
    verdict: str


def compare(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Comparison:
    """Values by seed -> the paired comparison of them, with its verdict."""
    seeds = sorted(ours.keys() & theirs.keys())
    a, b = np.array([ours[s] for s in seeds]), np.array([theirs[s] for s in seeds])
    with np.errstate(invalid="ignore"):
        d = summarize(a - b)
        relative = relative_change(float(a.mean()), float(b.mean())) if seeds else None
    interval = confidence_interval(d)
    return Comparison(d.mean, d.std, interval, relative, d.n, verdict(d.mean, interval, d.n))


def confidence_interval(d: Summary) -> tuple[float, float] | None:
    """The 95% interval of the mean of n differences; None if n < 2 or a difference is not finite."""
    if d.std is None or not math.isfinite(d.mean):
        return None
    half = t_quantile(d.n - 1) * d.std / math.sqrt(d.n)
    return d.mean - half, d.mean + half


def verdict(difference: float | None, interval: tuple[float, float] | None, n: int) -> str:
    """ "better" or "worse" if the 95% interval of at least 5 paired differences leaves out 0; "undecided" for fewer."""
    if n == 0:
        return "not measured"
    if not math.isfinite(difference):
        return "diverged"
    if n < MIN_SEEDS:
        return f"undecided, n = {n}"
    low, high = interval
    if low <= 0 <= high:
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
    """(P, K) -> (3, K): the 25th percentile, the median and the 75th over the policies."""
    return np.percentile(np.asarray(values, dtype=np.float64), [25, 50, 75], axis=0)


# -----------------------------------------------------------------------------
# costs


def ratio(part: float | None, whole: float | None) -> float | None:
    """`part / whole`; None where either has not been measured or the whole is 0."""
    return part / whole if part is not None and whole else None


def total(values: Sequence[float | None]) -> float | None:
    """The sum; None if there is nothing, or any of it has not been measured."""
    return sum(values) if values and None not in values else None


def mean(values: Sequence[float | None]) -> float | None:
    """The mean; None if there is nothing, or any of it has not been measured."""
    return ratio(total(values), len(values))
