"""A small training loop such as a user has: it warms up, accumulates, clips, compiles and resumes.

B rows, 4 inputs, 3 outputs.
"""

from __future__ import annotations

import io

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, SequentialLR

import jel

ACCUMULATE, WARM_UP = 2, 4


def make_model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def groups_of(model: nn.Module) -> list[dict]:
    """Two param groups, as with decayed matrices and undecayed vectors."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def adamw(model, tensor: bool = False) -> torch.optim.Optimizer:
    groups = groups_of(model)
    if tensor:
        groups = [{**group, "lr": torch.tensor(3e-3)} for group in groups]
    return torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.1, foreach=False if tensor else None)


def sgd(model) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups_of(model), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)


def warm_up(optimizer):
    return LinearLR(optimizer, 0.1, total_iters=WARM_UP)


def warm_up_and_down(optimizer):
    down = LambdaLR(optimizer, lambda step: 1 - step / 12)
    return SequentialLR(optimizer, [warm_up(optimizer), down], [WARM_UP])


def batch(step: int, part: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + part)
    return torch.randn(5, 4, generator=generator), torch.randint(3, (5,), generator=generator)


class Loop:
    """`attach(optimizer, inner)` -> what the loop steps after every optimizer step, a list."""

    def __init__(self, make_optimizer, make_inner, attach=None, compiled: bool = False):
        self.model = make_model()
        self.optimizer = make_optimizer(self.model)
        self.inner = make_inner(self.optimizer) if make_inner else None
        self.schedulers = attach(self.optimizer, self.inner) if attach else [self.inner] if self.inner else []
        self.forward = torch.compile(self.model, backend="eager") if compiled else self.model
        self.rates: list[list[float]] = []

    def train(self, steps: range) -> Loop:
        for step in steps:
            self.rates.append([float(group["lr"]) for group in self.optimizer.param_groups])
            for part in range(ACCUMULATE):
                x, y = batch(step, part)
                (nn.functional.cross_entropy(self.forward(x), y) / ACCUMULATE).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
            self.optimizer.step()
            for scheduler in self.schedulers:
                scheduler.step()
            self.optimizer.zero_grad()
        return self

    def save(self) -> bytes:
        """A checkpoint as loops write it."""
        file, unique = io.BytesIO(), [self.model, self.optimizer, *self.schedulers]
        torch.save([part.state_dict() for part in unique], file)
        return file.getvalue()

    def load(self, data: bytes) -> Loop:
        saved = torch.load(io.BytesIO(data), weights_only=True)
        for part, state in zip([self.model, self.optimizer, *self.schedulers], saved, strict=True):
            part.load_state_dict(state)
        return self

    def same_as(self, other: Loop) -> bool:
        """Weights, optimizer state and the rates of every step, bit for bit."""
        mine, theirs = (loop.optimizer.state_dict()["state"] for loop in (self, other))
        return (
            all(torch.equal(a, b) for a, b in zip(self.model.parameters(), other.model.parameters(), strict=True))
            and all(
                torch.equal(torch.as_tensor(mine[i][k]), torch.as_tensor(theirs[i][k])) for i in mine for k in mine[i]
            )
            and self.rates == other.rates
        )


def attached(total_steps: int, schedule, **options):
    """One jel.Scheduler around the loop's own scheduler."""
    return lambda optimizer, inner: [jel.Scheduler(optimizer, total_steps, schedule, inner, **options)]
