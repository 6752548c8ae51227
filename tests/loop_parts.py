"""A training loop in pieces for the tests: at module level, so that worker processes find them too."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from jel.tasks.loop import LoopTask


def classes(rows: int = 160, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of 16: inputs (16, 6) and labels (16,) that a small network can learn."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator)
    y = (x[:, :3] * torch.tensor([1.0, -2.0, 0.5])).argmax(1)
    return list(zip(x.split(16), y.split(16)))


def make_net(dropout: float = 0.0) -> nn.Module:
    middle = nn.Dropout(dropout) if dropout else nn.Identity()
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), middle, nn.Linear(12, 3))


def make_adamw(model: nn.Module) -> torch.optim.Optimizer:
    first, *rest = list(model.parameters())
    return torch.optim.AdamW([{"params": [first], "weight_decay": 0.3}, {"params": rest, "lr": 3e-3}], lr=1e-2)


def make_adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95))


def make_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)


def make_rmsprop(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(model.parameters(), lr=1e-3)


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def cross_entropy(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def net_task(make_optimizer=make_adamw, **choices) -> LoopTask:
    pieces = {"make_model": make_net, "batches": classes(), "loss": cross_entropy, "probe": classes(64, seed=1)}
    return LoopTask(**{"steps": 12, **pieces, "make_optimizer": make_optimizer, **choices})


class Point(nn.Module):
    """`loss = floor + |x|^2 / 2`, from a start of ones: gradient descent at rate 1 is there in one step."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(4) + 0.1 * torch.randn(4))


def distance(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """With a slope that differs from batch to batch: noise in the gradient."""
    return 0.1 + 0.5 * model.x.square().sum() + (batch * model.x).sum()


def descent(rate: float, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=rate)


def quadratic(rate: float, noise: float = 0.0, **choices) -> LoopTask:
    slopes = noise * torch.randn(50, 4, generator=torch.Generator().manual_seed(3))
    batches = list(slopes - slopes.mean(0))
    choices = {"steps": 40, **choices}
    return LoopTask(Point, partial(descent, rate), batches, distance, [torch.zeros(4)], **choices)
