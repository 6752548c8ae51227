"""The report's figures: plain data in, a matplotlib Figure out. Equal data give equal files, byte for byte.

S seeds (each with a policy of its own), U meta-training updates, K decisions. Colours are Okabe and Ito's, which
colour-blind readers can tell apart; lines differ in their dashes as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from scripts.report.statistics import MIN_SEEDS, mean_curve, quartiles

INK, GRID = "#333333", "#e4e4e4"
STYLE = [
    "default",
    {
        "svg.hashsalt": "report",
        "savefig.dpi": 160,
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": "#888888",
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": GRID,
        "axes.axisbelow": True,
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "lines.linewidth": 1.8,
    },
]

BLUE, ORANGE, GREEN, VERMILION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PURPLE, SKY, BLACK, OTHER = "#cc79a7", "#56b4e9", "#000000", "#666666"
LINES = {
    "jel": (VERMILION, "-"),
    "schedule_free": (BLUE, "--"),
    "hand_tuned": (GREEN, "-."),
    "best_constant": (ORANGE, (0, (6, 1, 1, 1))),
    "suboptimal": ("#777777", ":"),
}
GROUP_LINES = [(VERMILION, "-"), (BLUE, "--"), (GREEN, "-."), (PURPLE, ":"), (ORANGE, "-"), (SKY, "--")]
MORE_LINES = [(PURPLE, (0, (5, 1))), (SKY, (0, (1, 1))), (BLACK, (0, (3, 1, 1, 1)))]


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """Write `name`.png and `name`.svg, without the date and the version that matplotlib would add."""
    with matplotlib.style.context(STYLE):
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


# -----------------------------------------------------------------------------
# Figure 2


@matplotlib.style.context(STYLE)
def validation_figure(
    curves: Mapping[str, Sequence[Mapping[int, float]]], labels: Mapping[str, str], subtitle: str
) -> Figure:
    """Bits per byte by step, for each method one curve a seed: the mean, and the range of the seeds as a band.

    Left the whole run, right its end, between the methods that come near the best.
    """
    drawn = {method: mean_curve(runs) for method, runs in curves.items()}
    order = sorted(drawn, key=lambda method: drawn[method][1][-1], reverse=True)  # the legend stands as the lines do
    more = iter(MORE_LINES * len(order))
    lines = {method: LINES.get(method) or next(more) for method in sorted(order)}
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    whole, end = figure.subplots(1, 2, width_ratios=[1.25, 1])
    for axes in (whole, end):
        for method in order:
            steps, mean, low, high = drawn[method]
            color, dashes = lines[method]
            axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
            axes.plot(steps, mean, color=color, linestyle=dashes, label=f"{labels[method]}  {mean[-1]:.3f}")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    whole.set_ylabel("validation bits per byte")
    whole.set_title(subtitle)
    whole.legend(title="mean at the end", alignment="left", loc="upper right")
    first = 0.6 * max(steps[-1] for steps, *_ in drawn.values())
    best = min(mean[-1] for _, mean, *_ in drawn.values())
    near = [drawn[method] for method in order if drawn[method][1][-1] <= 1.15 * best]
    ends = [
        edge[i]
        for steps, _, *band in near
        for edge in band
        for i, step in enumerate(steps)
        if step >= min(first, steps[-1])
    ]
    room = 0.08 * (max(ends) - min(ends)) or 0.01 * best
    end.set(
        xlim=(first, 1.02 * first / 0.6),
        ylim=(min(ends) - room, max(ends) + room),
        title="the last 40%, methods within 15% of the best",
    )
    return figure


# -----------------------------------------------------------------------------
# Figure 3


@matplotlib.style.context(STYLE)
def multiplier_figure(
    progress: Sequence[float],
    multipliers: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    constant: Mapping[str, float],
    subtitle: str,
) -> Figure:
    """The final policies' multipliers at their K decisions, a panel a hyperparameter, a colour a set of param groups.

    `progress` (K,), `multipliers` by hyperparameter and groups, (S, K): thin, each seed's; thick, their median; the
    band, their quartiles. `constant`: the best constant's multipliers, by hyperparameter, drawn beside them.
    """
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    panels = figure.subplots(1, len(multipliers), sharey=True, squeeze=False)[0]
    for axes, (name, groups) in zip(panels, multipliers.items()):
        lines = GROUP_LINES * len(groups) if len(groups) > 1 else [(INK, "-")]
        for (group, values), (color, dashes) in zip(groups.items(), lines):
            low, median, high = quartiles(values)
            axes.fill_between(progress, low, high, color=color, alpha=0.18, linewidth=0)
            for policy in values:
                axes.plot(progress, policy, color=color, linewidth=0.6, alpha=0.45)
            axes.plot(progress, median, color=color, linestyle=dashes, marker="o", markersize=3.5, label=group)
        if name in constant:
            axes.axhline(constant[name], color=INK, linestyle=(0, (4, 2)), linewidth=1.4, label="best constant")
        axes.axhline(1, color="#999999", linewidth=0.8, zorder=1)
        axes.set(yscale="log", xlim=(-0.015, 1), xlabel="progress t/T", title=f"{name.replace('_', ' ')} multiplier")
    named = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels())}
    if "best constant" in named:
        named["best constant"] = named.pop("best constant")  # last
    columns = len(named) if len(named) <= 4 else -(-len(named) // 2)
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns, fontsize=9)
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(min(low, 0.5), max(high, 2))  # a policy near 1 everywhere is to look like one
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    panels[0].yaxis.set_minor_formatter(NullFormatter())
    figure.suptitle(subtitle, x=0.01, ha="left", fontsize=10.5)
    return figure


# -----------------------------------------------------------------------------
# meta-training


@matplotlib.style.context(STYLE)
def meta_training_figure(
    entropy: Sequence[Sequence[float]],
    return_mean: Sequence[Sequence[float]],
    return_best: Sequence[Sequence[float]],
    subtitle: str,
) -> Figure:
    """Entropy (nats per action dimension) and the episodes' returns by update: mean and range of the seeds; (S, U)."""
    figure = Figure(figsize=(9, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, values, color, dashes, name in (
        (left, entropy, GREEN, "-", None),
        (right, return_best, BLUE, "--", "best of the group"),
        (right, return_mean, VERMILION, "-", "mean of the group"),
    ):
        x = np.asarray(values, dtype=np.float64)  # (S, U)
        updates = np.arange(1, x.shape[1] + 1)
        axes.fill_between(updates, x.min(0), x.max(0), color=color, alpha=0.18, linewidth=0)
        axes.plot(updates, x.mean(0), color=color, linestyle=dashes, marker=".", label=name)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    left.set(title="policy entropy, nats per action dimension", xlabel="update")
    low, high = left.get_ylim()
    left.set_ylim(min(low, 0), max(high, 1))  # a collapse is a fall to below 0, not a wiggle
    right.set(title="return of an episode, nats of probe loss", xlabel="update")
    right.legend(loc="best")
    figure.suptitle(subtitle, x=0.01, ha="left", fontsize=10.5)
    return figure


# -----------------------------------------------------------------------------
# Figure 4


@matplotlib.style.context(STYLE)
def ablation_figure(rows: Sequence[Mapping], subtitle: str) -> Figure:
    """What each change to the recipe costs, in bits per byte: a line a row, its 95% interval, the worst at the top.

    Filled where the interval of at least `MIN_SEEDS` seeds leaves out 0. What lies outside the axis, which holds every
    mean but not every interval, is cut off.
    """
    order = sorted(rows, key=lambda row: -row["difference"])
    means = [-row["difference"] for row in order]
    room = 0.25 * (max(*means, 0.0) - min(*means, 0.0)) or 0.01
    figure = Figure(figsize=(8, 1.1 + 0.24 * len(order)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=VERMILION, linewidth=1.4, zorder=1)
    for y, (row, mean) in enumerate(zip(order, means)):
        low, high = (-edge for edge in reversed(row["interval"])) if row["interval"] else (mean, mean)
        shown = len(row["test_bpb"]) >= MIN_SEEDS and not low <= 0 <= high
        axes.plot([low, high], [y, y], color=BLUE if shown else OTHER, linewidth=1.4)
        axes.plot(mean, y, "o", color=BLUE if shown else OTHER, markerfacecolor=None if shown else "white")
    axes.set_yticks(range(len(order)), labels=[f"{row['name']} ({len(row['test_bpb'])})" for row in order], fontsize=9)
    axes.set_xlim(min(*means, 0.0) - room, max(*means, 0.0) + room)
    axes.set_xlabel("bits per byte above JEL's (right of the line: worse)")
    axes.grid(axis="y", visible=False)
    figure.suptitle(subtitle, x=0.01, ha="left", fontsize=10.5)
    return figure
