"""A schedule out of a search's numbers, and one episode of a task under it: what the Optuna and Ray integrations share.

A number a knob and decision, named `<knob>@<decision>`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from jel.contract import ANY
from jel.errors import JelError
from jel.knobs import Knob, Multipliers, check_knobs, multipliers_from_values
from jel.schedule import make_schedule
from jel.tasks.base import Task

KNOBS = (Knob("lr", "lr", bounds=(0.1, 10.0)),)


def space_of(knobs: Sequence[Knob], points: int) -> dict[str, tuple[float, float]]:
    """`{"<knob>@<i>": bounds}` for `points` decisions, evenly over a run. Raises `JelError` for none."""
    check_knobs(knobs)
    if points < 1:
        raise JelError(f"a schedule has at least one decision, not {points}")
    return {f"{knob.name}@{i}": knob.bounds for i in range(points) for knob in knobs}


def schedule_from(values: Mapping[str, float], knobs: Sequence[Knob], points: int, source: str) -> dict[str, Any]:
    """The schedule of such numbers; it fits any optimizer, since it was searched for the one at hand."""
    if missing := space_of(knobs, points).keys() - values.keys():
        raise JelError(f"no value for {', '.join(sorted(missing))}")
    rows = [
        {
            "progress": i / points,
            "multipliers": multipliers_from_values(knobs, [values[f"{k.name}@{i}"] for k in knobs]),
        }
        for i in range(points)
    ]
    return make_schedule(rows, source, ANY)


def run_episode(
    task: Task, schedule: Mapping[str, Any], group: int = 0, report: Callable[[int, float], None] | None = None
) -> float:
    """The probe loss after one episode under the schedule: infinite if it blew up.

    `report(step, probe_loss)` is called before every decision but the first, and may raise to end the episode early.
    """
    steps = task.num_steps(group)
    rows = schedule["decisions"]
    firsts = [math.ceil(row["progress"] * steps - 1e-9) for row in rows] + [steps]
    task.reset(group, range(1))
    for row, first, after in zip(rows, firsts, firsts[1:]):
        if first and report is not None and after > first:
            report(first, _probe_loss(task))
        if after > first:
            task.train(first, after - first, _tensors(row["multipliers"]))
    return _probe_loss(task)


def _probe_loss(task: Task) -> float:
    loss = float(task.observe(["probe_loss"])["probe_loss"][0])
    return loss if math.isfinite(loss) else math.inf


def _tensors(multipliers: Multipliers) -> Multipliers:
    return {group: {key: torch.tensor([float(m)]) for key, m in own.items()} for group, own in multipliers.items()}
