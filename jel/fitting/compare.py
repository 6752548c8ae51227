"""Do no harm: what was learned beside the untouched base, on fresh seeds, before it is handed out.

Shapes: V seeds, W ways to run (the base first).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from jel.knobs import Knob, Multipliers
from jel.schedule import bounds_of
from jel.tasks.base import Task

FRESH = 1_000_000  # groups of episodes numbered from here on are the comparison's: no update saw their seeds
# one-sided 95% points of Student's t, by degrees of freedom
T95 = (math.inf, 6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)

Rows = list[dict]  # [{"progress": p, "multipliers": {group: {hyperparameter: m}}}, ...]


def candidate(way: str, learned: Rows, carry: float, knobs: Sequence[Knob]) -> Rows:
    """What a way to be compared does: "base", "carried" (learning rates times `carry`, within bounds) or "learned"."""

    def value(group: str, key: str, learned: float) -> float:
        if way == "base":
            return 1.0
        low, high = bounds_of(knobs, group, key) or (0.0, math.inf)
        return min(max(learned * carry, low), high) if way == "carried" and key == "lr" else learned

    return [
        {
            "progress": row["progress"],
            "multipliers": {
                g: {key: value(g, key, m) for key, m in of.items()} for g, of in row["multipliers"].items()
            },
        }
        for row in learned
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
    """What the comparison says of the way `chosen` (0: none is worth handing out).

    `gain`: of the longest runs compared, mean over seeds and the least that the noise allows (95%); `at_end`: the same,
    projected to the end of the real run. In logs of loss: 0.1 is a loss about 10% lower; plain differences where a
    loss is not above 0.
    """

    chosen: int
    gain: tuple[float, float]
    at_end: tuple[float, float]

    @property
    def better(self) -> bool:
        return self.chosen > 0 and self.gain[1] > 0 and self.at_end[1] > 0


def judge(losses: Sequence[Sequence[Sequence[float]]], lengths: Sequence[int], run_steps: int) -> Verdict:
    """(V, lengths, W) losses -> the way whose projected gain over the base is largest, and what is known of it.

    A rate that is better over a short run may be worse over a long one. So where the comparison is shorter than the
    run there are two lengths, and the gain is projected along the logarithm of length, in a straight line: a gain that
    shrinks so fast that it would be gone by the end is none. (An assumption: gains that level off are given up too.)
    Bounds are one-sided, of the paired differences over seeds, by Student's t; the best of several ways is a little
    lucky, which they do not correct.
    """
    positive = all(x > 0 for seed in losses for of in seed for x in of)
    doublings = math.log(run_steps / lengths[-1]) / math.log(lengths[-1] / lengths[0]) if len(lengths) > 1 else 0.0
    best = Verdict(0, (0.0, 0.0), (0.0, 0.0))
    for way in range(1, len(losses[0][0])):
        if not all(math.isfinite(of[way]) for seed in losses for of in seed):
            continue
        gains = [[_gain(of[0], of[way], positive) for of in seed] for seed in losses]
        last = _bounded([of[-1] for of in gains])
        end = _bounded([of[-1] + doublings * (of[-1] - of[0]) for of in gains])
        if best.chosen == 0 or end[0] > best.at_end[0]:
            best = Verdict(way, last, end)
    return best


def _gain(base: float, way: float, positive: bool) -> float:
    if not math.isfinite(base):
        return 1.0  # the base blew up and this did not
    return math.log(base / way) if positive else base - way


def _bounded(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and the mean less what it may owe to noise."""
    n, mean = len(values), sum(values) / len(values)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else math.inf
    return mean, mean - (T95[min(n - 1, len(T95) - 1)] * error if error else 0.0)
