"""Optuna and JEL: a schedule as a trial on short episodes, and a rate searched under a learned shape.

python -m examples.optuna_schedule       needs optuna
"""

from __future__ import annotations

import optuna
import torch
from torch import nn

import jel
from jel.integrations.optuna import schedule_of, suggest_schedule, task_objective
from jel.knobs import Knob
from jel.tasks.loop import LoopTask

STEPS, BATCH, EPISODE, TRIALS = 300, 32, 60, 16
RATE, SHAPE = ((Knob("lr", "lr", bounds=(1 / most, most)),) for most in (100.0, 5.0))  # what a trial turns, how far


def data() -> tuple[list, list, list]:
    """A function with a kink, and noise: batches to train on, to choose by, and to test with."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2400, 8, generator=generator)
    y = x[:, 0] * x[:, 1] + x[:, 2].abs() + 0.1 * torch.randn(2400, generator=generator)
    batches = lambda a, b: list(zip(x[a:b].split(BATCH), y[a:b].split(BATCH)))
    return batches(0, 1600), batches(1600, 2000), batches(2000, 2400)


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0))


def make_optimizer(model: nn.Module, lr: float = 1e-4) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr)


def loss(model: nn.Module, batch: tuple) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def run(schedule: dict, split: int = 2, lr: float = 1e-4, mode: str = "absolute") -> float:
    """Train from scratch under a schedule; the loss on the test data (split 2) or the probe data (split 1)."""
    torch.manual_seed(0)
    (train, held_out), model = (data()[i] for i in (0, split)), make_model()
    optimizer = make_optimizer(model, lr)
    scheduler = jel.Scheduler(optimizer, STEPS, schedule, mode=mode)
    for step in range(STEPS):
        loss(model, train[step % len(train)]).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return sum(loss(model, batch).item() for batch in held_out) / len(held_out)


def main(trials: int = TRIALS) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print(f"AdamW as it is: test loss {run(jel.schedules.constant(1.0)):.4f}")
    # short episodes of a task, pruned where they go badly
    train, probe, _ = data()
    task = LoopTask(make_model, make_optimizer, train, loss, probe, steps=EPISODE)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(task_objective(task, points=3, knobs=RATE), n_trials=trials)
    print(f"the best of {trials} short episodes: test loss {run(schedule_of(study.best_trial)):.4f}")

    # whole runs: the trial chooses the peak rate, and the shape that goes with it
    def objective(trial: optuna.Trial) -> float:
        shape = suggest_schedule(trial, points=3, knobs=SHAPE)
        return run(shape, split=1, lr=trial.suggest_float("peak", 1e-4, 1e-1, log=True), mode="shape")

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(objective, n_trials=max(1, trials // 4))
    shape, peak = schedule_of(study.best_trial), study.best_params["peak"]
    print(f"the best of {max(1, trials // 4)} whole runs: test loss {run(shape, lr=peak, mode='shape'):.4f}")


if __name__ == "__main__":
    main()
