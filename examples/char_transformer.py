"""A character transformer in plain PyTorch on Python's own source; AdamW decays matrices only.

python -m examples.char_transformer
"""

from __future__ import annotations

import argparse
import inspect
import tarfile

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jel
from jel.tasks.loop import LoopTask

STEPS, BATCH, CONTEXT, WIDTH, BUDGET = 150, 16, 32, 32, 8.0  # the budget of jel.fit is in runs


def data(seed: int) -> tuple[list, list, list]:
    """Batches of windows of characters: to train on, to choose by, and to test with."""
    codes = torch.tensor([min(ord(c), 127) for m in (argparse, tarfile, inspect) for c in inspect.getsource(m)])
    windows = codes.unfold(0, CONTEXT + 1, CONTEXT + 1)  # side by side
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]
    return windows[:-512].split(BATCH)[:-1], windows[-512:-256].split(64), windows[-256:].split(64)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(128, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        block = nn.TransformerEncoderLayer(WIDTH, 2, 4 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128))

    def forward(self, codes: Tensor) -> Tensor:
        x = self.embed(codes) + self.place.weight
        return self.head(self.blocks(x, nn.Transformer.generate_square_subsequent_mask(CONTEXT), is_causal=True))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    matrices, others = ([p for p in model.parameters() if (p.ndim > 1) == m] for m in (True, False))
    groups = [{"params": matrices, "name": "matrices"}, {"params": others, "name": "others", "weight_decay": 0.0}]
    return torch.optim.AdamW(groups)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def make_task(seed: int = 0) -> LoopTask:
    train, probe, _ = data(seed)
    return LoopTask(Transformer, make_optimizer, train, loss, probe, steps=STEPS, clip_norm=1.0, seed=seed)


def run(make_optimizer, make_scheduler, seed: int, split: int = 2) -> float:
    """Train from scratch; the loss on the test data (split 2) or on the probe data (split 1)."""
    torch.manual_seed(seed)
    (train, held_out), model = (data(seed)[i] for i in (0, split)), Transformer()
    optimizer = make_optimizer(model)
    scheduler = make_scheduler(optimizer, STEPS)
    model.train()
    for step in range(STEPS):
        loss(model, train[step % len(train)]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return sum(loss(model, batch).item() for batch in held_out) / len(held_out)


if __name__ == "__main__":
    learned = jel.fit(make_task(), budget=BUDGET)
    for name, schedule in (("AdamW as it is", jel.schedules.constant(1.0)), ("with JEL", learned.schedule)):
        print(f"{name}: test loss {run(make_optimizer, lambda o, n, s=schedule: jel.Scheduler(o, n, s), 0):.4f}")
