"""How the cost of a training step grows with each of its sizes: measurements, fitted power laws, and their plot."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median

import numpy as np

from scripts.bench.worker import Worker, interleaved, result_of, seconds_of


def power_law(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float, float]:
    """(factor, exponent, error): cost = factor * size^exponent by least squares of the logarithms.

    `error` is the largest relative distance of a cost from that line: 0.1 = 10%.

    >>> [round(value, 6) for value in power_law([1, 2, 4], [3, 12, 48])]
    [3.0, 2.0, 0.0]
    """
    slope, intercept = np.polyfit(np.log(sizes), np.log(costs), 1)
    fitted = np.exp(intercept) * np.asarray(sizes, float) ** slope
    return float(np.exp(intercept)), float(slope), float(np.abs(np.asarray(costs) / fitted - 1).max())


def points_of(step: dict) -> dict[str, dict[int, dict]]:
    """For each axis the spec of each size, around the spec of a training step."""
    model, quarter = step["model"], max(1, step["rows"] // 4)
    sizes, threads = (1, 2, 4, 8), dict.fromkeys((1, min(2, os.cpu_count()), os.cpu_count()))
    lengths = [model["sequence_len"] * n // 2 for n in sizes]
    return {
        "depth": {n: {**step, "model": {**model, "n_layer": n}} for n in sizes},
        "batch": {quarter * n: {**step, "rows": quarter * n} for n in sizes},
        "sequence": {T: {**step, "model": {**model, "sequence_len": T}, "rows": quarter} for T in lengths},
        "episodes": {n: {**step, "runs": n, "rows": quarter} for n in sizes},
        "threads": {n: {**step, "threads": n} for n in threads},
    }


def measure(device: str, step: dict, seconds: float) -> dict[str, dict]:
    """For each axis its `curve`, in about so many seconds.

    Costs are medians: milliseconds a step, and for the axis "memory" megabytes over the number of episodes.
    """
    points = {axis: specs for axis, specs in points_of(step).items() if len(specs) > 1}  # one core: no threads
    if device == "cuda":
        points.pop("threads", None)
    curves = {}
    share = seconds / (len(points) + 1)
    with ExitStack() as stack:
        worker = stack.enter_context(Worker(device))
        for axis, specs in points.items():
            times = interleaved({n: partial(seconds_of, worker, spec) for n, spec in specs.items()}, share)
            curves[axis] = curve({n: median(ts) * 1e3 for n, ts in times.items()}, "ms a step")
    if device == "cpu":
        curves["ranks"] = curve(rank_times({**step, "threads": 1}, share), "ms a step")
    memory = {}
    for n, spec in points["episodes"].items():
        with Worker(device) as worker:  # the recorded peak of a process never falls: one for each size
            memory[n] = result_of(worker, {**spec, "case": "memory"})["bytes"] / 1e6
    curves["memory"] = curve(memory, "MB")
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
        sides = {1: partial(seconds_of, alone, step), 2: partial(seconds_of, pair, step)}
        times = interleaved(sides, seconds)
    return {n: median(ts) * 1e3 for n, ts in times.items()}


def curve(costs: Mapping[int, float], unit: str) -> dict:
    """The costs of two sizes or more: `{"sizes", "costs", "unit", "factor", "exponent", "error"}`; see `power_law`."""
    factor, exponent, error = power_law([*costs], [*costs.values()])
    fit = {"factor": factor, "exponent": exponent, "error": error}
    return {"sizes": [*costs], "costs": [*costs.values()], "unit": unit, **fit}


def describe(axis: str, curve: Mapping) -> str:
    """A curve as one line: its exponent, how far the points lie from the fit, and the points."""
    points = ", ".join(f"{size}: {cost:.4g}" for size, cost in zip(curve["sizes"], curve["costs"]))
    fit = f"fit within {curve['error']:.0%}" if len(curve["sizes"]) > 2 else "two points"
    return f"{f'growth with {axis}':<52} exponent {curve['exponent']:.2f}, {fit} ({points}) {curve['unit']}"


def growth_figure(curves: Mapping[str, Mapping], title: str):
    """A panel per axis, both scales logarithmic: the costs, the fitted power law, and proportional growth (dashed).

    Over threads and ranks the dashed line falls: a cost divided by their number.
    """
    import matplotlib.style  # here: measuring needs no matplotlib

    from scripts.report.figures import STYLE

    with matplotlib.style.context(STYLE):
        return _growth_figure(curves, title)


def _growth_figure(curves: Mapping[str, Mapping], title: str):
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from scripts.report.figures import BLUE, ORANGE

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    panels = figure.subplots(2, -(-len(curves) // 2)).flat
    for (axis, found), axes in zip(curves.items(), panels):  # in this order zip takes no panel too many
        sizes, costs = np.array(found["sizes"]), np.array(found["costs"])
        proportional = costs[0] * (sizes / sizes[0]) ** (-1.0 if axis in ("threads", "ranks") else 1.0)
        axes.plot(sizes, proportional, color="#999999", linestyle="--", linewidth=1)
        axes.plot(sizes, found["factor"] * sizes ** found["exponent"], color=ORANGE, linewidth=1.2)
        axes.plot(sizes, costs, color=BLUE, marker="o", markersize=4, linestyle="none")
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
    title = f"{title}. Points: measured; line: fit; dashed: in proportion"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    return figure
