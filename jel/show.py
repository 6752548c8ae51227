"""Schedules for other eyes: CSV, a plot in the terminal, a picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jel.errors import JelError
from jel.knobs import multipliers_of_group

BLOCKS = "▁▂▃▄▅▆▇█"


def curves(schedule: Mapping[str, Any]) -> tuple[list[float], dict[tuple[str, str], list[float]]]:
    """The decision points, and the multipliers there of every (group, hyperparameter) that the schedule names."""
    rows = schedule["decisions"]
    pairs = {(group, key) for row in rows for group, own in row["multipliers"].items() for key in own}
    found = {
        (group, key): [float(multipliers_of_group(row["multipliers"], group).get(key, 1.0)) for row in rows]
        for group, key in sorted(pairs)
    }
    return [float(row["progress"]) for row in rows], found


def as_csv(schedule: Mapping[str, Any]) -> str:
    """`progress,group,hyperparameter,multiplier` lines; a multiplier holds from its progress on until the next.

    A group's own lines go before those of "*".
    """
    points, found = curves(schedule)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["progress", "group", "hyperparameter", "multiplier"])
    for i, point in enumerate(points):
        for (group, key), values in found.items():
            writer.writerow([repr(point), group, key, repr(values[i])])
    return out.getvalue()


def as_text(schedule: Mapping[str, Any], width: int = 48) -> str:
    """A line a curve: its values over progress on a log scale, the lowest and the highest named."""
    points, found = curves(schedule)
    lines = []
    for (group, key), values in found.items():
        sampled = [values[sum(p <= x / width for p in points) - 1] for x in range(width)]
        low, high = math.log(min(values)), math.log(max(values))
        level = lambda v, low=low, high=high: round((math.log(v) - low) / (high - low) * 7) if high > low else 3
        bars = "".join(BLOCKS[level(v)] for v in sampled)
        lines.append(f"{group + '.' + key:>24} {bars} x{min(values):.3g} to x{max(values):.3g}")
    return "\n".join([*lines, f"{'progress':>24} 0{'1':>{width - 1}}"])


def save_picture(schedule: Mapping[str, Any], path: Path) -> None:
    """The curves as steps over progress. Raises `JelError` without matplotlib, or if it cannot be written."""
    try:
        import matplotlib
    except ImportError:
        raise JelError("a picture needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    points, found = curves(schedule)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (group, key), values in found.items():
        axes.step([*points, 1.0], [*values, values[-1]], where="post", label=f"{group} {key}")
    axes.set(xlabel="progress t / T", ylabel="multiplier", yscale="log", xlim=(0, 1))
    axes.axhline(1.0, color="0.7", linewidth=0.8)
    axes.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as e:
        raise JelError(f"cannot write {path} ({e})") from None
    finally:
        pyplot.close(figure)
