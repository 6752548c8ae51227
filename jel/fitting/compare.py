"""Do no harm: what was learned beside the untouched base, on fresh seeds, before it is handed out.

Shapes: V seeds, W ways to run (the base first), K decisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from jel.knobs import Multipliers
from jel.tasks.base import Task

FRESH = 1_000_000  # groups of episodes numbered from here on are the comparison's: no update saw their seeds
# one-sided 95% points of Student's t, by degrees of freedom
T95 = (math.inf, 6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)

Rows = list[dict]  # [{"progress": p, "multipliers": {group: {hyperparameter: m}}}, ...]


def damped(rows: Rows, power: float) -> Rows:
    """Every multiplier to this power: 0 is the base, 1 the rows themselves, in between a part of the way."""
    return [
        {
            "progress": row["progress"],
            "multipliers": {
                group: {key: value**power for key, value in of.items()} for group, of in row["multipliers"].items()
            },
        }
        for row in rows
    ]


def run_side_by_side(
    task: Task, group: int, ways: Sequence[Rows], stop_requested: Callable[[], bool] = lambda: False
) -> list[float] | None:
    """The probe loss at the end of a run under each of W schedules of the same decision points, same seed for all.

    Infinite for a run that blew up; None if stopped half way.
    """
    steps = task.num_steps(group)
    task.reset(group, range(len(ways)))
    firsts = [math.ceil(row["progress"] * steps - 1e-9) for row in ways[0]] + [steps]
    for k, (first, after) in enumerate(zip(firsts, firsts[1:])):
        if stop_requested():
            return None
        if after > first:
            task.train(first, after - first, _together([way[k]["multipliers"] for way in ways]))
    losses = task.observe(["probe_loss"])["probe_loss"]
    return [float(x) if math.isfinite(x) else math.inf for x in losses.tolist()]


def _together(chosen: Sequence[Multipliers]) -> Multipliers:
    """W multipliers -> one with tensors (W,)."""
    return {g: {key: torch.tensor([m[g][key] for m in chosen]) for key in of} for g, of in chosen[0].items()}


@dataclass(frozen=True)
class Verdict:
    """Which way is handed out: `chosen` (0 is the base), by how much it is better, and at least how much (95%)."""

    chosen: int
    better: float
    at_least: float


def judge(losses: Sequence[Sequence[float]]) -> Verdict:
    """(V, W) losses -> the way that is best on average, if it is better than the base by more than the noise.

    By the one-sided 95% bound of the paired difference over seeds (Student's t). The best of several ways is a little
    lucky; the bound does not correct for that.
    """
    ways, best = len(losses[0]), Verdict(0, 0.0, 0.0)
    for way in range(1, ways):
        differences = [row[0] - row[way] for row in losses]
        if not all(math.isfinite(row[way]) for row in losses):
            continue
        if not all(map(math.isfinite, differences)):  # the base itself blows up, and this does not
            differences = [d if math.isfinite(d) else abs(row[way]) for d, row in zip(differences, losses)]
        n, mean = len(differences), sum(differences) / len(differences)
        spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / max(1, n - 1) / n)
        bound = mean - T95[min(n - 1, len(T95) - 1)] * spread if n > 1 else -math.inf
        if best.chosen == 0 or mean > best.better:
            best = Verdict(way, mean, bound)
    return best


def accepted(verdict: Verdict) -> bool:
    return verdict.chosen > 0 and verdict.at_least > 0
