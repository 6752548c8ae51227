"""Ray and JEL: the episodes of jel.fit over a cluster, and a schedule as a trial of Tune.

python -m examples.ray_cluster           needs ray[tune]; uses this machine, or the cluster of $RAY_ADDRESS
"""

from __future__ import annotations

import ray
import torch
from ray import tune
from torch import nn

import jel
from jel.integrations.ray import RayTask, schedule_of, search_space, trainable
from jel.knobs import Knob
from jel.tasks.loop import LoopTask

STEPS, BATCH, EPISODE, TRIALS, WORKERS, BUDGET = 300, 32, 60, 8, 2, 4.0  # the budget of jel.fit is in runs
KNOBS = (Knob("lr", "lr", bounds=(0.01, 100.0)),)  # what a trial of Tune turns, and how far


def data() -> tuple[list, list, list]:
    """A function with a kink, and noise: batches to train on, to choose by, and to test with."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2400, 8, generator=generator)
    y = x[:, 0] * x[:, 1] + x[:, 2].abs() + 0.1 * torch.randn(2400, generator=generator)
    batches = lambda a, b: list(zip(x[a:b].split(BATCH), y[a:b].split(BATCH)))
    return batches(0, 1600), batches(1600, 2000), batches(2000, 2400)


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def loss(model: nn.Module, batch: tuple) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def make_task(steps: int) -> LoopTask:
    train, probe, _ = data()
    return LoopTask(make_model, make_optimizer, train, loss, probe, steps=steps, workers=1)  # an actor is one process


def run(schedule: dict) -> float:
    """Train from scratch under a schedule; the loss on the test data."""
    torch.manual_seed(0)
    (train, _, test), model = data(), make_model()
    optimizer = make_optimizer(model)
    scheduler = jel.Scheduler(optimizer, STEPS, schedule)
    for step in range(STEPS):
        loss(model, train[step % len(train)]).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return sum(loss(model, batch).item() for batch in test) / len(test)


def main(budget: float = BUDGET, trials: int = TRIALS) -> None:
    print(f"AdamW as it is: test loss {run(jel.schedules.constant(1.0)):.4f}")
    learned = jel.fit(RayTask(make_task(STEPS), workers=WORKERS), budget=budget, base="rough")
    print(f"with JEL: test loss {run(learned.schedule):.4f}")
    settings = tune.TuneConfig(metric="probe_loss", mode="min", num_samples=trials)
    space = search_space(points=3, knobs=KNOBS)
    found = tune.Tuner(trainable(make_task(EPISODE), 3, KNOBS), param_space=space, tune_config=settings).fit()
    best = schedule_of(found.get_best_result(), 3, KNOBS)
    print(f"the best of {trials} trials of Tune: test loss {run(best):.4f}")
    ray.shutdown()


if __name__ == "__main__":
    main()
