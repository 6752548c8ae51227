"""Lightning: the scheduler on the interval "step", multipliers in the module's log.

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters())
        return step_schedule(optimizer, jel.Scheduler(optimizer, total_steps(self.trainer), schedule))

    lightning.Trainer(callbacks=[JelCallback()])

Lightning's checkpoints hold the scheduler's state, so `ckpt_path=` goes on exactly. With `accumulate_grad_batches` a
step is an optimizer step.
"""

from __future__ import annotations

from typing import Any

import lightning
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import jel
from jel.errors import JelError
from jel.integrations.common import multiplier_values, scheduler_in


def total_steps(trainer: lightning.Trainer) -> int:
    """The optimizer steps that this trainer will take. Raises `JelError` for a run without an end."""
    steps = trainer.estimated_stepping_batches
    if not steps < float("inf"):
        raise JelError("how long is this run? Give the lightning.Trainer max_steps or max_epochs")
    return int(steps)


def step_schedule(optimizer: Optimizer, scheduler: LRScheduler) -> dict[str, Any]:
    """What `configure_optimizers` returns: a scheduler stepped after every optimizer step, not after every epoch."""
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 1}}


class JelCallback(lightning.Callback):
    """Logs `jel/<group>/<knob>` every `log_every_n_steps`, and tells the scheduler the loss of each training batch.

    It refuses a scheduler on the interval "epoch": that one would hold its first decision nearly for ever.
    """

    def __init__(self) -> None:
        self.scheduler: jel.Scheduler | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        configs = trainer.lr_scheduler_configs
        self.scheduler = scheduler_in([config.scheduler for config in configs])
        for config in configs:
            if scheduler_in(config.scheduler) is not None and config.interval != "step":
                raise JelError(f"this jel.Scheduler is stepped every {config.interval}; give it interval='step'")

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: Tensor
    ) -> None:
        if self.scheduler is not None:  # Lightning has divided it by the number of batches that it accumulates
            self.scheduler.observe(loss=loss * trainer.accumulate_grad_batches)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.scheduler is not None and trainer.logger is not None:
            pl_module.log_dict(multiplier_values(self.scheduler.multipliers), on_step=True, on_epoch=False)
