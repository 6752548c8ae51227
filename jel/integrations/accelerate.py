"""Hugging Face Accelerate: a scheduler that takes one step per optimizer step, whatever the number of processes.

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    scheduler = prepare_scheduler(accelerator, jel.Scheduler(optimizer, total_steps, schedule))
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss(model, batch)); optimizer.step(); scheduler.step(); optimizer.zero_grad()

`total_steps` counts optimizer steps of one process. `accelerator.save_state` and `load_state` include the scheduler.
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor

import jel
from jel.errors import JelError
from jel.integrations.common import multiplier_values, scheduler_in


def prepare_scheduler(accelerator: Accelerator, scheduler: jel.Scheduler) -> AcceleratedScheduler:
    """As `accelerator.prepare(scheduler)`, but one step a step: Accelerate itself takes a step per process.

    It is skipped with the optimizer's step: between accumulation steps, and where an fp16 step overflowed. Raises
    `JelError` for a scheduler of an optimizer that the accelerator has not prepared.
    """
    ours = [o for o in accelerator._optimizers if getattr(o, "optimizer", o) is scheduler.optimizer]
    if not ours:
        raise JelError("prepare the optimizer first, then make the jel.Scheduler of it: accelerator.prepare(optimizer)")
    wrapped = AcceleratedScheduler(scheduler, ours, step_with_optimizer=True, split_batches=True)
    accelerator._schedulers.append(wrapped)
    return wrapped


def observe(accelerator: Accelerator, scheduler: Any, loss: Tensor) -> None:
    """Tell a controller with feedback the loss, its mean over the processes: the same decision is then made in each."""
    own = scheduler_in(scheduler)
    if own is None:
        raise JelError("observe() needs a jel.Scheduler, plain or prepared")
    own.observe(loss=accelerator.reduce(loss.detach(), reduction="mean"))


def log_multipliers(accelerator: Accelerator, scheduler: Any, step: int) -> None:
    """The multipliers to the accelerator's own trackers (`log_with`), as `jel/<group>/<knob>`."""
    own = scheduler_in(scheduler)
    if own is not None:
        accelerator.log(multiplier_values(own.multipliers), step=step)
