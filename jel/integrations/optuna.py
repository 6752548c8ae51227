"""Optuna: a schedule as part of a trial.

```python
def objective(trial):
    schedule = suggest_schedule(trial, points=4)            # Optuna searches the schedule, or
    lr = trial.suggest_float("lr", 1e-5, 1e-1, log=True)    # a learned schedule's shape under a rate that it searches:
    ...; scheduler = jel.Scheduler(optimizer, steps, learned, mode="shape")

study.optimize(task_objective(task), n_trials=20)           # on the short episodes of `jel.fit`
schedule = schedule_of(study.best_trial)
```
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optuna

from jel.errors import JelError
from jel.integrations.episodes import KNOBS, run_episode, schedule_from, space_of
from jel.knobs import Knob
from jel.tasks.base import Task

ATTRIBUTE = "jel_schedule"  # a user attribute of the trial


def suggest_schedule(trial: optuna.Trial, points: int = 4, knobs: Sequence[Knob] = KNOBS) -> dict[str, Any]:
    """A schedule of `points` decisions, a number a knob and decision: `trial` suggests each on a log scale.

    It is kept with the trial, so that `schedule_of` finds it again.
    """
    space = space_of(knobs, points)
    values = {name: trial.suggest_float(name, *bounds, log=True) for name, bounds in space.items()}
    schedule = schedule_from(values, knobs, points, f"optuna trial {trial.number}")
    trial.set_user_attr(ATTRIBUTE, schedule)
    return schedule


def schedule_of(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """The schedule that `suggest_schedule` made for this trial. Raises `JelError` if it made none."""
    if ATTRIBUTE not in trial.user_attrs:
        raise JelError(f"trial {trial.number} has no schedule: its objective did not call suggest_schedule")
    return trial.user_attrs[ATTRIBUTE]


def task_objective(
    task: Task, points: int = 4, knobs: Sequence[Knob] = KNOBS, group: int = 0
) -> Callable[[optuna.Trial], float]:
    """An objective: the probe loss after one episode of a task (`jel.tasks.loop.LoopTask`) under a suggested schedule.

    The probe loss is reported before every decision, so that the study's pruner can end an episode that goes badly.
    `group` numbers the episode: the same initialisation and data for all trials.
    """

    def objective(trial: optuna.Trial) -> float:
        def report(step: int, loss: float) -> None:
            trial.report(loss, step)
            if trial.should_prune():
                raise optuna.TrialPruned

        return run_episode(task, suggest_schedule(trial, points, knobs), group, report)

    return objective
