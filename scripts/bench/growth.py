"""How the cost of a training step grows with each of its sizes: measurements, exponents, and their plot.

An exponent is the slope of the least-squares line through (log size, log cost): 1 is linear.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from statistics import median

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from scripts.bench.worker import Worker, ask, in_turn, run
from scripts.report.figures import BLUE, STYLE

REASONS = {  # what makes a curve steeper than linear, where one is
    "sequence": "attention is quadratic in it",
    "batch": "its activations outgrow the cache",
    "episodes": "their activations outgrow the cache",
    "threads": "every operation ends with the threads waiting for each other",
    "ranks": "a step has an exchange or two for each param group, and each takes its time whatever its size",
}


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of log cost over log size.

    >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def points_of(step: dict) -> dict[str, dict[int, dict]]:
    """For each axis the spec of each size, around the spec of a training step."""
    model, rows = step["model"], step["rows"]
    sizes = (1, 2, 4, 8)
    return {
        "depth": {n: {**step, "model": {**model, "n_layer": n}} for n in sizes},
        "batch": {rows * n // 4: {**step, "rows": rows * n // 4} for n in sizes},
        "sequence": {
            T: {**step, "model": {**model, "sequence_len": T}, "rows": rows // 4}
            for T in (model["sequence_len"] * n // 2 for n in sizes)
        },
        "episodes": {n: {**step, "runs": n, "rows": rows // 4} for n in sizes},
        "threads": {n: {**step, "threads": n} for n in dict.fromkeys((1, min(2, os.cpu_count()), os.cpu_count()))},
    }


def measure(device: str, step: dict, seconds: float) -> dict[str, dict]:
    """`{axis: {"sizes", "costs", "unit", "exponent", "reason"}}` in about so many seconds.

    Costs are medians: milliseconds a step, and for the axis "memory" megabytes over the number of episodes.
    """
    points, curves = points_of(step), {}
    if device == "cuda":
        del points["threads"]
    share = seconds / (len(points) + 1)
    with ExitStack() as stack:
        worker = stack.enter_context(Worker(device))
        for axis, specs in points.items():
            times = in_turn({n: lambda spec=spec: run(worker, spec) for n, spec in specs.items()}, share)
            curves[axis] = curve(axis, {n: median(ts) * 1e3 for n, ts in times.items()}, "ms a step")
    if device == "cpu":
        curves["ranks"] = curve("ranks", rank_times({**step, "threads": 1}, share), "ms a step")
    memory = {}
    for n, spec in points["episodes"].items():
        with Worker(device) as worker:  # the peak of a process never falls: each size has its own
            memory[n] = ask(worker, {**spec, "case": "memory"})["bytes"] / 1e6
    curves["memory"] = curve("memory", memory, "MB")
    return curves


def rank_times(step: dict, seconds: float) -> dict[int, float]:
    """Milliseconds for the same batch on 1 rank and on 2, a thread each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with ExitStack() as stack:
        alone = stack.enter_context(Worker("cpu"))
        pair = [stack.enter_context(Worker("cpu", RANK=str(rank), **address)) for rank in range(2)]
        times = in_turn(
            {n: lambda workers=workers: run(workers, step) for n, workers in ((1, [alone]), (2, pair))}, seconds
        )
    return {n: median(ts) * 1e3 for n, ts in times.items()}


def curve(axis: str, costs: Mapping[int, float], unit: str) -> dict:
    slope = exponent([*costs], [*costs.values()]) if len(costs) > 1 else math.nan
    return {
        "sizes": [*costs],
        "costs": [*costs.values()],
        "unit": unit,
        "exponent": slope,
        "reason": REASONS.get(axis, "") if slope > {"threads": -0.9, "ranks": -0.9}.get(axis, 1.05) else "",
    }


@matplotlib.style.context(STYLE)
def growth_figure(curves: Mapping[str, Mapping], subtitle: str) -> Figure:
    """A panel an axis, both scales logarithmic: the costs, and dashed what growth in proportion would be."""
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    panels = figure.subplots(2, -(-len(curves) // 2)).flat
    for (axis, found), axes in zip(curves.items(), panels):  # this way round no panel is lost
        sizes, costs = np.array(found["sizes"]), np.array(found["costs"])
        falls = axis in ("threads", "ranks")
        axes.plot(
            sizes,
            costs[0] * (sizes / sizes[0]) ** (-1.0 if falls else 1.0),
            color="#999999",
            linestyle="--",
            linewidth=1,
        )
        axes.plot(sizes, costs, color=BLUE, marker="o", markersize=4)
        axes.set(
            xscale="log",
            yscale="log",
            title=f"{axis}: exponent {found['exponent']:.2f}",
            ylabel=found["unit"],
            xlabel="episodes" if axis == "memory" else axis,
        )
        for scale, values in ((axes.xaxis, sizes), (axes.yaxis, (costs.min(), costs.max()))):
            scale.set_major_locator(FixedLocator(values))
            scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
            scale.set_minor_locator(NullLocator())
    for axes in [*panels]:
        axes.set_axis_off()
    figure.suptitle(subtitle, x=0.01, ha="left", fontsize=10.5)
    return figure
