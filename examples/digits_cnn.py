"""A small convolutional net on the handwritten digits of scikit-learn, in a loop as torchvision's and timm's are.

python -m examples.digits_cnn        needs scikit-learn
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import jel
from jel.tasks.loop import LoopTask

EPOCHS, BATCH, BUDGET = 8, 64, 8.0  # the budget of jel.fit is in runs


def data(seed: int) -> tuple[list, list, list]:
    """Batches to train on, to choose by, and to test with: 1078, 359 and 360 images of 8 x 8."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
    y = torch.tensor(digits.target)[order]
    batches = lambda a, b: list(zip(x[a:b].split(BATCH), y[a:b].split(BATCH)))
    return batches(0, 1078), batches(1078, 1437), batches(1437, 1797)


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


def loss(model: nn.Module, batch: tuple) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def make_task(seed: int = 0) -> LoopTask:
    train, probe, _ = data(seed)
    return LoopTask(make_model, make_optimizer, train, loss, probe, steps=EPOCHS * len(train), seed=seed)


def run(make_optimizer, make_scheduler, seed: int, split: int = 2) -> float:
    """Train from scratch; the loss on the test data (split 2) or on the probe data (split 1)."""
    torch.manual_seed(seed)
    train, held_out = data(seed)[0], data(seed)[split]
    model = make_model()
    optimizer = make_optimizer(model)
    scheduler = make_scheduler(optimizer, EPOCHS * len(train))
    for _ in range(EPOCHS):
        model.train()
        for i in torch.randperm(len(train)).tolist():
            optimizer.zero_grad()
            loss(model, train[i]).backward()
            optimizer.step()
            scheduler.step()
    model.eval()
    with torch.no_grad():
        return sum(loss(model, batch).item() * len(batch[1]) for batch in held_out) / sum(len(b[1]) for b in held_out)


if __name__ == "__main__":
    learned = jel.fit(make_task(), budget=BUDGET)
    for name, schedule in (("AdamW as it is", jel.schedules.constant(1.0)), ("with JEL", learned.schedule)):
        print(f"{name}: test loss {run(make_optimizer, lambda o, n, s=schedule: jel.Scheduler(o, n, s), 0):.4f}")
