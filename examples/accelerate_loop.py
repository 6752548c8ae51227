"""A loop under Accelerate: two micro-batches a step, clipping, a checkpoint to go on from. Next characters of Python.

python -m examples.accelerate_loop       needs accelerate; or: accelerate launch --cpu -m examples.accelerate_loop
"""

from __future__ import annotations

import argparse
import inspect
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

import jel
from jel.integrations.accelerate import prepare_scheduler
from jel.tasks.loop import LoopTask

STEPS, BATCH, MICRO_BATCHES, CONTEXT, BUDGET = 200, 64, 2, 8, 4.0  # the budget of jel.fit is in runs


def data() -> list[list]:
    """Eight characters and the next one: batches to train on, to choose by, and to test with."""
    codes = torch.tensor([min(ord(c), 127) for c in inspect.getsource(argparse)])
    rows = codes.unfold(0, CONTEXT + 1, CONTEXT + 1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    parts = rows[:-1024].split(BATCH)[:-1], rows[-1024:-512].split(BATCH), rows[-512:].split(BATCH)
    return [[(batch[:, :-1], batch[:, -1]) for batch in part] for part in parts]


def make_model() -> nn.Module:
    layers = nn.Embedding(128, 16), nn.Flatten(), nn.Linear(16 * CONTEXT, 64), nn.Tanh(), nn.Linear(64, 128)
    return nn.Sequential(*layers)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def loss(model: nn.Module, batch: tuple) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def run(schedule: dict, saved: Path, stop_at: int = STEPS) -> float:
    """Train, from what is saved if anything is; the test loss. What stops early saves."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO_BATCHES)
    torch.manual_seed(0)
    train, _, test = data()
    model = make_model()
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    scheduler = prepare_scheduler(accelerator, jel.Scheduler(optimizer, STEPS, schedule))
    if saved.exists():
        accelerator.load_state(str(saved))
    for step in range(scheduler.scheduler.last_epoch, stop_at):  # both count steps of the optimizer
        for micro_batch in zip(*(part.chunk(MICRO_BATCHES) for part in train[step % len(train)])):
            with accelerator.accumulate(model):
                accelerator.backward(loss(model, micro_batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    if stop_at < STEPS:
        accelerator.save_state(str(saved))
    with torch.no_grad():
        return sum(loss(model, batch).item() for batch in test) / len(test)


if __name__ == "__main__":
    train, probe, _ = data()
    task = LoopTask(make_model, make_optimizer, train, loss, probe, steps=STEPS, clip_norm=1.0)
    learned = jel.fit(task, budget=BUDGET, base="rough")
    for name, schedule in (("AdamW as it is", jel.schedules.constant(1.0)), ("with JEL", learned.schedule)):
        with tempfile.TemporaryDirectory() as folder:
            run(schedule, Path(folder, "state"), stop_at=STEPS // 2)
            print(f"{name}: test loss {run(schedule, Path(folder, 'state')):.4f}")  # goes on at the half
