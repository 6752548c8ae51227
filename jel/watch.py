"""Watch a run or a meta-training run from its log: multipliers per group over progress, and the loss.

    jel watch RUN                       drawn in the terminal whenever its log grows, until the run is finished
    jel watch RUN --once                what there is now
    jel watch RUN --picture now.png     and as a picture, rewritten each time

The drawing is in pure functions, for other programs to use: `view_of` reads records, `text_chart` and `figure_of` draw.

A curve is a list of (x, y); curves are named `<group>/<knob>` for multipliers, where `all` stands for every group.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jel.errors import JelError
from jel.files import write_files
from jel.tracking import flat_record, read_records

Curve = list[tuple[float, float]]
Curves = dict[str, Curve]
MARKS = "*o+x#@%&"
LOSSES = ("train/smooth_loss", "train/loss", "val/loss", "val/bpb", "train/probe_last", "train/return_mean")


@dataclass
class View:
    """What is drawn of a log. `earlier`: the multipliers of earlier updates of a meta-training run, oldest first."""

    title: str
    multipliers: Curves = field(default_factory=dict)  # over progress t/T
    earlier: list[Curves] = field(default_factory=list)
    losses: Curves = field(default_factory=dict)  # over steps, or over updates


# -----------------------------------------------------------------------------
# reading


def view_of(records: Sequence[Mapping[str, Any]], total: int | None = None, name: str = "run", keep: int = 3) -> View:
    """The curves in the records of a log. `total`: its steps or updates, None while it is not known.

    A record with `decision_progress` is one of meta-training, and holds all the decisions of that update's policy:
    the newest are drawn, and `keep` earlier ones behind them. Any other log is a training run's, a step a record.
    """
    learning = [r for r in records if r.get("decision_progress") and r.get("multipliers")]
    last = max((r["step"] for r in records), default=-1) + 1
    view = View(f"{name}: {'update' if learning else 'step'} {last}" + (f" of {total}" if total else ""))
    if learning:
        at = sorted({round(i * (len(learning) - 1) / keep) for i in range(keep + 1)})
        *view.earlier, view.multipliers = [decided_curves(learning[i]) for i in at]
    for record in records:
        flat = flat_record(record)
        if not learning:
            for key, value in flat.items():
                if key.startswith("jel/"):
                    view.multipliers.setdefault(key[4:], []).append((record["step"] / (total or max(last, 1)), value))
        for key in LOSSES:
            if key in flat and math.isfinite(flat[key]):
                view.losses.setdefault(key, []).append((record["step"], flat[key]))
    if "train/smooth_loss" in view.losses:
        view.losses.pop("train/loss", None)  # what the smooth one smooths
    return view


def decided_curves(record: Mapping[str, Any]) -> Curves:
    """The multipliers of a meta-training record over progress, each held until the next decision and the last to 1."""
    points = [*record["decision_progress"], 1.0]
    named = {
        f"{'all' if group == '*' else group}/{knob}": [*values, values[-1]]
        for group, own in record["multipliers"].items()
        for knob, values in own.items()
    }
    return {name: list(zip(points, values, strict=True)) for name, values in named.items()}


def total_of(run: str | Path) -> int | None:
    """The steps or updates that the run in this folder is to have, if its configuration says so."""
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    for file in ("config.json", "tracking.json"):
        try:
            known = json.loads((folder / file).read_bytes())
            flags = {**known, **known.get("flags", {}), **known.get("config", {})}
            numbers = (flags.get("updates"), known.get("num_iterations"), flags.get("total_steps"))
            return next(int(n) for n in numbers if isinstance(n, int) and n > 0)
        except (OSError, ValueError, RecursionError, TypeError, AttributeError, StopIteration):
            continue
    return None


# -----------------------------------------------------------------------------
# drawing


def text_chart(
    curves: Curves, width: int = 72, height: int = 10, log: bool = False, span: tuple[float, float] | None = None
) -> list[str]:
    """Curves as lines of text of at most `width` characters, `height` of them rows of the chart, then x and a legend.

    `log`: the y axis is logarithmic, and values at or below 0 are left out. `span`: the x axis, if not all of the
    curves'. Where curves meet, the first one shows.
    """
    drawn = {name: [(x, y) for x, y in c if math.isfinite(y) and (y > 0 or not log)] for name, c in curves.items()}
    drawn = {name: curve for name, curve in drawn.items() if curve}
    if not drawn:
        return ["(nothing to draw yet)"]
    scale: Callable[[float], float] = math.log10 if log else float
    xs = [x for curve in drawn.values() for x, _ in curve]
    ys = [scale(y) for curve in drawn.values() for _, y in curve]
    (left, right), (low, high) = span or _range(xs), _range(ys, room=0.15 if log else 0.0)
    columns = max(width - 10, 8)
    grid = [[" "] * columns for _ in range(height)]
    for name, mark in reversed(list(zip(drawn, MARKS * len(drawn)))):
        for column, y in enumerate(_sampled(drawn[name], left, right, columns)):
            if y is not None:
                grid[round((high - scale(y)) / (high - low) * (height - 1))][column] = mark
    lines = []
    for i, row in enumerate(grid):
        value = high - i / max(height - 1, 1) * (high - low)
        lines.append(f"{10**value if log else value:>8.3g} |" + "".join(row).rstrip())
    lines.append(" " * 9 + "+" + "-" * columns)
    lines.append(f"{'':10}{left:<{columns - 8}.3g}{right:>8.3g}")
    lines += [f"{'':10}{mark} {name} {drawn[name][-1][1]:.4g}" for name, mark in zip(drawn, MARKS * len(drawn))]
    return lines


def _range(values: Sequence[float], room: float = 0.0) -> tuple[float, float]:
    low, high = min(values) - room, max(values) + room
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _sampled(curve: Curve, left: float, right: float, columns: int) -> list[float | None]:
    """The curve's value in each column: the last point at or before it; None before its first and after its last."""
    values: list[float | None] = [None] * columns
    at = [min(max(round((x - left) / (right - left) * (columns - 1)), 0), columns - 1) for x, _ in curve]
    for (_, y), first, end in zip(curve, at, [*at[1:], at[-1] + 1]):
        for column in range(first, max(end, first + 1)):
            values[column] = y
    return values


def text_of(view: View, width: int = 72) -> str:
    """The whole view as text."""
    lines = [view.title, "", "multipliers over progress (log scale)"]
    lines += text_chart(view.multipliers, width, log=True, span=(0, 1))
    for name, curve in view.losses.items():
        lines += ["", *text_chart({name: curve}, width, height=6)]
    return "\n".join(lines)


def figure_of(view: View) -> Any:
    """The view as a matplotlib `Figure`: multipliers over progress, a panel a knob, and the losses."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise JelError("a picture needs matplotlib: pip install matplotlib") from None
    knobs = list(dict.fromkeys(name.rpartition("/")[2] for name in view.multipliers)) or ["multipliers"]
    figure = Figure(figsize=(3.6 * (len(knobs) + 1), 3.4), layout="constrained")
    *panels, last = figure.subplots(1, len(knobs) + 1, squeeze=False)[0]
    ages = [*((curves, 0.12 + 0.3 * i / len(view.earlier)) for i, curves in enumerate(view.earlier))]
    for axes, knob in zip(panels, knobs):
        for curves, alpha in [*ages, (view.multipliers, 1.0)]:
            own = [(name.rpartition("/")[0], c) for name, c in curves.items() if name.endswith(f"/{knob}")]
            for i, (group, curve) in enumerate(own):
                label = group if curves is view.multipliers else ""
                axes.plot(*zip(*curve), drawstyle="steps-post", color=f"C{i}", alpha=alpha, label=label)
        axes.axhline(1, color="#999999", linewidth=0.8, zorder=1)
        axes.set(yscale="log", xlim=(0, 1), xlabel="progress t/T", title=f"{knob} multiplier")
        axes.legend(frameon=False, fontsize=8)
    for name, curve in view.losses.items():
        last.plot(*zip(*curve), label=name)
    last.set(title=view.title, xlabel=view.title.rpartition(": ")[2].split()[0])
    if view.losses:
        last.legend(frameon=False, fontsize=8)
    return figure


def save_picture(view: View, path: str | Path) -> None:
    """Write the figure, by the suffix of `path` (.png, .svg, .pdf), never half written."""
    from io import BytesIO

    buffer, path = BytesIO(), Path(path)
    try:
        figure_of(view).savefig(buffer, format=path.suffix.lstrip(".") or "png", dpi=130)
    except ValueError as e:
        raise JelError(f"cannot draw {path} ({e})") from None
    write_files({path: buffer.getvalue()})


# -----------------------------------------------------------------------------
# the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder, or its log.jsonl")
    parser.add_argument("--once", action="store_true", help="draw what there is now, and end")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="between looks at the log")
    parser.add_argument("--picture", metavar="PATH", help="also draw this .png, .svg or .pdf")


def run_command(args: argparse.Namespace, out: Callable[[str], None] = print) -> int:
    """`jel watch`: raises `JelError` in one line if there is nothing to read."""
    run, drawn = Path(args.run), None
    try:
        while True:
            finished = args.once or ((run if run.is_dir() else run.parent) / "result.json").exists()
            records = read_records(run)
            if len(records) != drawn:
                drawn = len(records)
                view = view_of(records, total_of(run), run.resolve().name)
                width = min(shutil.get_terminal_size().columns, 100)
                out(("" if finished else "\033[2J\033[H") + text_of(view, width))  # else: on a cleared screen
                if args.picture:
                    save_picture(view, args.picture)
            if finished:
                return 0
            time.sleep(max(args.every, 0.1))
    except KeyboardInterrupt:
        return 0
