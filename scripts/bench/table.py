"""The rows of the benchmark's table: one measured rate, alone or beside the one it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles

from scripts.bench.worker import interleaved


@dataclass(frozen=True)
class Row:
    """One line of the table: rates in `unit`, and `ratio`, the median over rounds of ours to other.

    `quartiles`: the first and the third quartile of that ratio.
    """

    what: str
    unit: str
    ours: float
    against: str = ""
    other: float | None = None
    ratio: float | None = None
    quartiles: tuple[float, float] | None = None
    rounds: int = 1
    target: str = ""
    note: str = ""

    def __str__(self) -> str:
        parts = [f"{self.what:<52} {self.ours:>12,.4g} {self.unit}"]
        if self.other is not None:
            spread = " ({:.2f}-{:.2f}, {} rounds)".format(*self.quartiles, self.rounds) if self.quartiles else ""
            parts.append(f"{self.ratio:.3g}x{spread} {self.against}: {self.other:,.4g}")
        return "; ".join([*parts, *filter(None, (self.target and f"target {self.target}", self.note))])


def compared(
    what: str,
    unit: str,
    amount: float,
    ours: Callable[[], float],
    against: str,
    other: Callable[[], float],
    seconds: float,
    target: str = "",
    note: str = "",
) -> Row:
    """Time both sides in turn for about `seconds`; each returns the seconds it takes for `amount` of the unit."""
    times = interleaved({"ours": ours, "other": other}, seconds)
    ratios = [b / a for a, b in zip(times["ours"], times["other"])]
    low, _, high = quantiles(ratios, n=4)
    rates = [amount / median(times[side]) for side in ("ours", "other")]
    return Row(what, unit, rates[0], against, rates[1], median(ratios), (low, high), len(ratios), target, note)
