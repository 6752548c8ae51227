"""The report's first figure: what each method reaches against what it costs to find its settings."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from scripts.report.costs import exploratory_runs, tuning_cost
from scripts.report.evidence import LABELS, Evidence
from scripts.report.figures import LINES, OTHER, STYLE
from scripts.report.statistics import summarize

NEAR = 1.15  # JEL and methods within this factor of the best are drawn to scale, worse ones at the upper edge
STEP = 1.13  # between equal prices
APART = 1.7  # points whose prices lie closer than this factor share a column of labels


@dataclass(frozen=True, eq=False)
class Point:
    """A method: bits per byte over seeds; run equivalents of finding its settings, and runs spent by hand before."""

    name: str
    bpb: Sequence[float]
    price: float
    by_hand: int = 0
    color: str = OTHER
    control: bool = False
    recovered: bool = False

    @property
    def mean(self) -> float:
        return summarize(self.bpb).mean or 0.0

    @property
    def std(self) -> float:
        return summarize(self.bpb).std or 0.0

    @property
    def label(self) -> str:
        name = self.name.removesuffix(" over the same constants")
        by_hand = f" (+ {self.by_hand} by hand)" if self.by_hand else ""
        return textwrap.fill(f"{name}{' (recovered)' if self.recovered else ''} {self.mean:.3f}{by_hand}", 36)


def price_points(evidence: Evidence) -> list[Point]:
    """Methods and controls at an equal budget whose price and test loss were measured, and that did not diverge."""
    points = []
    for method in evidence.methods():
        bpb, price = list(evidence.results(method, "test_bpb").values()), tuning_cost(evidence, method)
        if price is not None:
            color = LINES.get(method, (OTHER,))[0]
            recovered = any(evidence.results(method, "recoveries").values())
            by_hand = exploratory_runs(evidence, method)
            name = LABELS.get(method, method)
            points.append(Point(name, bpb, price - by_hand, by_hand, color, False, recovered))
    for row in evidence.sections.get("equal_budget", []):
        if row["run_equivalents"] is not None and None not in row["test_bpb"]:
            points.append(Point(row["name"], row["test_bpb"], row["run_equivalents"], control=True))
    return [p for p in points if p.bpb and all(map(math.isfinite, p.bpb))]


@matplotlib.style.context(STYLE)
def price_figure(points: Sequence[Point], subtitle: str) -> Figure:
    """Mean and standard deviation over seeds by price on a log axis; what cost nothing stands at its left end."""
    figure = Figure(figsize=(6.2, 4.8), layout="constrained")
    axes = figure.subplots()
    paid = [p.price for p in points if p.price > 0] or [1.0]
    nothing, right = min(paid) / 4, 15 * max(paid)  # right of the points is room for their names
    place = {p: max(p.price, nothing) for p in points}
    best = min(p.mean for p in points)
    ours = [p.mean for p in points if p.name == LABELS["jel"]]
    near = [p for p in points if p.mean <= max([NEAR * best, *ours])]
    low, high = min(p.mean - p.std for p in near), max(p.mean + p.std for p in near)
    room = 0.12 * (high - low) or 0.01 * best
    low, high = low - 1.5 * room, high + (2 if len(near) < len(points) else 1) * room
    axes.set(xscale="log", xlim=(nothing / 1.6, right), ylim=(low, high))
    place = dodged(place)
    for p, x in place.items():
        y, inside = (p.mean, True) if p in near else (high - 0.3 * room, False)
        style = {"color": p.color, "markersize": 9 if p.name == LABELS["jel"] else 7, "zorder": 4}
        if not inside:
            axes.plot(x, y, "^", **style)
        elif p.control:
            axes.errorbar(x, y, p.std, fmt="D", elinewidth=1, capsize=2, **{**style, "markersize": 5, "zorder": 3})
        else:
            axes.errorbar(x, y, p.std, fmt="o", elinewidth=1.8, capsize=3, **style)
    draw_labels(axes, {p: (place[p], p.mean if p in near else high - 0.3 * room) for p in points}, high - low)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if any(p.price <= 0 for p in points):
        ticks = [t for t in axes.get_xticks() if 2 * nothing <= t <= right]
        axes.set_xticks([nothing, *ticks], labels=["none", *(f"{t:g}" for t in ticks)])
    axes.set(
        xlabel="price of finding the settings, in training runs (similar prices drawn side by side)",
        ylabel="bits per byte of the test split",
    )
    axes.annotate("better and cheaper", (0.012, 0.015), (0.06, 0.055), **CORNER)
    figure.suptitle(subtitle, x=0.01, ha="left", fontsize=10.5)
    return figure


CORNER = {
    "xycoords": "axes fraction",
    "textcoords": "axes fraction",
    "color": OTHER,
    "fontstyle": "italic",
    "arrowprops": {"arrowstyle": "->", "color": OTHER},
}


def dodged(place: Mapping[Point, float]) -> dict[Point, float]:
    """Equal prices side by side, `STEP` apart around the price: error bars would cover each other."""
    moved: dict[Point, float] = {}
    for bunch in bunches(place, STEP):
        centre = math.exp(sum(math.log(place[p]) for p in bunch) / len(bunch))
        for i, p in enumerate(bunch):
            moved[p] = place[p] if len(bunch) == 1 else centre * STEP ** (i - (len(bunch) - 1) / 2)
    return moved


def bunches(place: Mapping[Point, float], factor: float) -> list[list[Point]]:
    """The points by price, those together whose price is within `factor` of the one before."""
    found: list[list[Point]] = []
    for p in sorted(place, key=lambda p: (place[p], p.mean)):
        if found and place[p] < factor * place[found[-1][-1]]:
            found[-1].append(p)
        else:
            found.append([p])
    return found


def draw_labels(axes: Axes, at: Mapping[Point, tuple[float, float]], height: float) -> None:
    """Names right of the points, apart from each other, joined to their points by thin lines."""
    low, high = axes.get_ylim()
    for column in bunches({p: x for p, (x, _) in at.items()}, APART):
        x = max(at[p][0] for p in column) * 1.3
        heights = {p: 0.052 * height * (1 + p.label.count("\n")) for p in column}
        wanted = sorted(column, key=lambda p: at[p][1])
        middles = spread([at[p][1] for p in wanted], [heights[p] for p in wanted], low, high)
        for p, y in zip(wanted, middles):
            axes.plot([at[p][0], x], [at[p][1], y], color="#bbbbbb", linewidth=0.7, zorder=1)
            axes.text(
                x,
                y,
                p.label,
                va="center",
                fontsize=9.5,
                color=p.color,
                fontweight="bold" if p.name == LABELS["jel"] else "normal",
                zorder=6,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.85},
            )


def spread(wanted: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """Middles of boxes as near to `wanted` (ascending) as can be without overlap, inside [low, high] if they fit."""
    middles: list[float] = []
    edge = low
    for y, h in zip(wanted, heights):  # upwards: none below its wish, none over the former
        middles.append(max(y, edge + h / 2))
        edge = middles[-1] + h / 2
    edge = high
    for i in range(len(middles) - 1, -1, -1):  # back down, as far as the upper end demands
        middles[i] = min(middles[i], edge - heights[i] / 2)
        edge = middles[i] - heights[i] / 2
    return middles
