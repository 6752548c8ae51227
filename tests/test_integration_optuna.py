"""Optuna: schedules as trials, on the episodes of a task."""

from __future__ import annotations

import pytest

optuna = pytest.importorskip("optuna")

import jel  # noqa: E402
from jel.integrations.episodes import run_episode, schedule_from, space_of  # noqa: E402
from jel.integrations.optuna import schedule_of, suggest_schedule, task_objective  # noqa: E402
from tests.jel_parts import QuadraticTask, knobs  # noqa: E402

optuna.logging.set_verbosity(optuna.logging.ERROR)
CORRECTED = (*knobs(10.0), jel.Knob("head", "lr", groups=("x",), bounds=(0.5, 2.0)))


def study(**options):
    return optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0), **options)


def test_a_suggested_schedule_is_a_schedule():
    searched = study()
    values = {f"{k}@{i}": 1.0 + i / 2 for i in range(3) for k in ("lr", "weight_decay", "head")}
    searched.enqueue_trial(values)
    schedule = suggest_schedule(searched.ask(), 3, CORRECTED)
    assert [row["progress"] for row in schedule["decisions"]] == [0.0, 1 / 3, 2 / 3]
    assert schedule["decisions"][2]["multipliers"] == {"*": {"lr": 2.0, "weight_decay": 2.0}, "x": {"lr": 4.0}}
    assert jel.ScheduleController(schedule).decide({"progress": 0.99})["x"] == {"lr": 4.0}
    assert schedule_of(searched.trials[0]) == schedule


def test_a_study_finds_what_lowers_the_probe_loss():
    searched = study()
    searched.optimize(task_objective(QuadraticTask()), n_trials=15)
    ones = run_episode(QuadraticTask(), jel.schedules.constant(1.0))
    best = schedule_of(searched.best_trial)
    assert searched.best_value < ones
    assert run_episode(QuadraticTask(), best) == searched.best_value  # nothing else than the schedule decides it


def test_a_pruner_ends_episodes():
    searched = study(pruner=optuna.pruners.ThresholdPruner(upper=-1.0))
    searched.optimize(task_objective(QuadraticTask(), points=3), n_trials=2)
    assert [t.state for t in searched.trials] == [optuna.trial.TrialState.PRUNED] * 2
    assert [list(t.intermediate_values) for t in searched.trials] == [[8], [8]]  # 23 steps: decisions at 0, 8, 16


def test_bad_input_is_one_line():
    with pytest.raises(jel.JelError, match="has no schedule"):
        schedule_of(optuna.trial.create_trial(value=1.0))
    with pytest.raises(jel.JelError, match="at least one decision"):
        space_of(knobs(), 0)
    with pytest.raises(jel.JelError, match="no value for lr@1"):
        schedule_from({"lr@0": 1.0}, knobs()[:1], 2, "a test")
