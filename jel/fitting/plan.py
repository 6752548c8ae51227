"""From a budget to a number of episodes: every numeric choice of `jel.fit`, in one place.

The unit of cost is a training step of the real run; a run of N steps costs N. n steps an episode, K decisions in it,
G episodes a group, U groups (updates). A look at the probe batches costs `probe` steps; an episode has two.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from jel.errors import JelError
from jel.fitting.compare import FRESH
from jel.knobs import Knob, multipliers_from_values
from jel.learn.exploration import Exploration
from jel.recipes.jel import JelRecipe
from jel.tasks.base import Task

LOOKS = 2  # at the probe batches in an episode: its start and its end (jel/fitting/sparse.py)


@dataclass(frozen=True)
class FitConfig:
    """The numbers behind `jel.fit`. docs/fit.md says how they were found."""

    # the search: from `fewest` to `updates` groups, as many as the budget pays for with episodes of `wanted_share` of
    # the run; with shorter episodes if it does not pay for `fewest`; then with smaller groups; then with fewer
    group: int = 8
    small_group: int = 4
    updates: int = 14
    fewest: int = 8
    wanted_share: float = 0.05
    decisions: int = 5
    shortest: int = 20  # steps of an episode, at least
    shortest_share: float = 0.02  # and at least this share of the run
    most_corrections: int = 3
    # the comparison with the base
    check_share: float = 0.5  # of the budget
    check_seeds: int = 3
    carry: float = 0.5  # the best rate of a run falls with its length to this power (an assumption)
    shortest_check: float = 1 / 16  # of the run: what is shorter says nothing of its end
    # the recipe
    initial_log_std: float = -0.5
    policy_lr: float = 1e-2
    correlation: float = 0.98
    compare_from: tuple[int, ...] = (6, 10)  # from so many groups on one, or two, only compare the policies so far

    def recipe(self, plan: Plan, knobs: tuple[Knob, ...]) -> FitRecipe:
        return FitRecipe(
            turned=knobs,
            initial_log_std=self.initial_log_std,
            learner="critic",
            policy_lr=self.policy_lr,
            updates=plan.updates,
            compare=sum(plan.updates >= enough for enough in self.compare_from),
            exploration=Exploration(self.correlation, antithetic=True),  # steadier than without, with so few groups
            episodes=plan.group,
            decision_interval=plan.interval,
        )


@dataclass(frozen=True)
class FitRecipe(JelRecipe):
    """The recipe of JEL over knobs of our own choice."""

    turned: tuple[Knob, ...] = ()

    def knobs(self) -> tuple[Knob, ...]:
        return self.turned


# -----------------------------------------------------------------------------
# what a step costs


@dataclass(frozen=True)
class Price:
    """Of a probe episode. `probe`: a look at the probe batches, in training steps (by FLOPs where they are counted)."""

    probe: float
    step_flops: float | None
    step_seconds: float  # of one episode, run with the others of its group
    spent: float  # what measuring took, in steps


def measure(task: Task, knobs: Sequence[Knob], config: FitConfig, steps: int = 4) -> Price:
    """Run the first steps of a group that is used for nothing else, and count and time them."""
    steps = min(steps, task.num_steps(0))
    group, ones = FRESH - 1, multipliers_from_values(knobs, [torch.ones(config.group)] * len(knobs))
    task.reset(group, range(config.group))
    start = task.observe(["probe_loss"])["probe_loss"]
    if not start.isfinite().all():
        raise JelError(f"the probe loss is {float(start[0])} before anything is learned: no schedule can mend that")
    task.train(0, 1, ones)  # whatever is slow once
    t0 = time.perf_counter()
    task.train(1, steps - 1, ones)
    t1 = time.perf_counter()
    step, looks = (t1 - t0) / max(1, steps - 1), 1
    if hasattr(task, "costs"):
        probe, flops = task.costs()
    else:
        task.observe(["probe_loss"])
        probe, flops, looks = (time.perf_counter() - t1) / max(step, 1e-9), None, 2
    return Price(probe, flops, step / config.group, config.group * (steps + looks * probe))


# -----------------------------------------------------------------------------
# the plan


@dataclass(frozen=True)
class Plan:
    """What will be run. `check_*`: the comparison of the `ways` with each other, side by side for each seed."""

    run_steps: int
    budget: float
    group: int
    updates: int
    episode_steps: int
    interval: int
    check_lengths: tuple[int, ...]  # steps: the run's, or two lengths of which the second is twice the first
    check_seeds: int
    ways: tuple[str, ...]  # what is compared
    probe: float
    measuring: float  # steps, spent already

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Plan:
        return cls(**{**record, **{key: tuple(record[key]) for key in ("check_lengths", "ways")}})

    def carry(self, power: float) -> float:
        """By what learning rates that were learned on these episodes are multiplied for the whole run."""
        return (self.episode_steps / self.run_steps) ** power

    @property
    def search(self) -> float:
        """Cost of the search, in runs."""
        return self.updates * self.group * (self.episode_steps + LOOKS * self.probe) / self.run_steps

    @property
    def check(self) -> float:
        each = sum(length + self.probe for length in self.check_lengths)
        return self.check_seeds * len(self.ways) * each / self.run_steps

    @property
    def runs(self) -> float:
        return self.search + self.check + self.measuring / self.run_steps

    def lines(self, price: Price) -> list[str]:
        """For a person, before anything is spent."""
        seconds = self.runs * self.run_steps * price.step_seconds
        flops = f", {price.step_flops:.3g} FLOPs a step" if price.step_flops else ""
        return [
            f"plan: {self.updates} updates x {self.group} episodes of {self.episode_steps} of the run's "
            f"{self.run_steps} steps, a decision every {self.interval} = {self.search:.3g} runs",
            f"      then {', '.join(self.ways)} side by side, {self.check_seeds} fresh seeds of "
            f"{' and '.join(map(str, self.check_lengths))} steps = {self.check:.3g} runs",
            f"      {self.runs:.3g} of the budget of {self.budget:g} runs, about {seconds:.0f} s here{flops}",
        ]


# what can be handed out: by comparisons of whole runs, by shorter ones, and where the episodes are whole runs
WHOLE_RUNS, SHORT, WHOLE_EPISODES = ("base", "carried", "learned"), ("base", "carried"), ("base", "learned")


def make_plan(run_steps: int, budget: float, price: Price, config: FitConfig, fixed_length: bool) -> Plan:
    """Spend `budget` runs. `fixed_length`: the task's episodes cannot be made shorter than the run.

    Raises `JelError` if the budget does not pay for one group of episodes and the comparison with the base.
    """
    total = budget * run_steps - price.spent
    shortest = max(config.shortest, math.ceil(config.shortest_share * run_steps), config.decisions)
    shortest = run_steps if fixed_length else min(shortest, run_steps)
    ways = WHOLE_EPISODES if fixed_length else WHOLE_RUNS
    lengths = _check_lengths(run_steps, total, len(ways), price, config, fixed_length)
    if lengths[-1] < run_steps:
        ways = SHORT
        lengths = _check_lengths(run_steps, total, len(ways), price, config, fixed_length)
    check = config.check_seeds * len(ways) * sum(length + price.probe for length in lengths)
    # the search
    left, looks = total - check, LOOKS * price.probe
    most = lengths[-1]  # no episode is longer than the runs that decide
    shortest = min(shortest, most)
    group = config.group if left >= config.fewest * config.group * (shortest + looks) else config.small_group
    paid = left / group  # steps of each of a group's episodes, over all groups
    wanted = min(max(shortest, math.ceil(config.wanted_share * run_steps)), most)
    updates = min(max(math.floor(paid / (wanted + looks)), config.fewest), config.updates)
    length = min(max(math.floor(paid / updates - looks), shortest), most)
    updates = min(updates, math.floor(paid / (length + looks) + 1e-9))
    if updates < 1:
        least = (group * (length + looks) + price.spent + check) / run_steps
        raise JelError(
            f"a budget of {budget:g} runs of {run_steps} steps does not pay for one group of {group} episodes "
            f"of {length} steps and the comparison with the base; give at least {math.ceil(100 * least) / 100:g}"
        )
    return Plan(
        run_steps=run_steps,
        budget=budget,
        group=group,
        updates=updates,
        episode_steps=length,
        interval=-(-length // config.decisions),
        check_lengths=lengths,
        check_seeds=config.check_seeds,
        ways=ways,
        probe=price.probe,
        measuring=price.spent,
    )


def _check_lengths(
    run_steps: int, total: float, ways: int, price: Price, config: FitConfig, fixed_length: bool
) -> tuple[int, ...]:
    """Whole runs if their share of the budget pays for them, else two lengths, to see where the gain tends."""
    runs = config.check_seeds * ways
    if fixed_length or runs * (run_steps + price.probe) <= config.check_share * total:
        return (run_steps,)
    longest = math.floor((config.check_share * total / runs - 2 * price.probe) / 1.5)
    longest = min(max(longest, math.ceil(config.shortest_check * run_steps), 2), run_steps)
    return (max(1, longest // 2), longest) if longest > 1 else (longest,)
