"""An MLP on a table: the breast-cancer data of scikit-learn, where a net overfits within a few epochs.

python -m examples.tabular_mlp       needs scikit-learn
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch import nn

import jel
from jel.tasks.loop import LoopTask

STEPS, BATCH, BUDGET = 200, 32, 8.0  # the budget of jel.fit is in runs


def data(seed: int) -> tuple[list, list, list]:
    """Batches to train on, to choose by, and to test with: 341, 114 and 114 patients of 30 measurements each."""
    table = load_breast_cancer()
    order = torch.randperm(len(table.target), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(table.data, dtype=torch.float32)[order], torch.tensor(table.target, dtype=torch.float32)[order]
    x = (x - x[:341].mean(0)) / x[:341].std(0)
    batches = lambda a, b: list(zip(x[a:b].split(BATCH), y[a:b].split(BATCH)))
    return batches(0, 341), batches(341, 455), batches(455, 569)


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


def loss(model: nn.Module, batch: tuple) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1])


def make_task(seed: int = 0) -> LoopTask:
    train, probe, _ = data(seed)
    return LoopTask(make_model, make_optimizer, train, loss, probe, steps=STEPS, seed=seed)


def run(make_optimizer, make_scheduler, seed: int, split: int = 2) -> float:
    """Train from scratch; the loss on the test data (split 2) or on the probe data (split 1)."""
    torch.manual_seed(seed)
    train, held_out = data(seed)[0], data(seed)[split]
    model = make_model()
    optimizer = make_optimizer(model)
    scheduler = make_scheduler(optimizer, STEPS)
    model.train()
    for step in range(STEPS):
        loss(model, train[step % len(train)]).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return sum(loss(model, batch).item() * len(batch[1]) for batch in held_out) / sum(len(b[1]) for b in held_out)


if __name__ == "__main__":
    learned = jel.fit(make_task(), budget=BUDGET)
    for name, schedule in (("AdamW as it is", jel.schedules.constant(1.0)), ("with JEL", learned.schedule)):
        print(f"{name}: test loss {run(make_optimizer, lambda o, n, s=schedule: jel.Scheduler(o, n, s), 0):.4f}")
