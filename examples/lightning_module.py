"""A Lightning module: the scheduler on the interval "step". Diabetes progression from ten measurements.

python -m examples.lightning_module     needs lightning and scikit-learn
"""

from __future__ import annotations

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import jel
from jel.integrations.lightning import JelCallback, step_schedule
from jel.tasks.loop import LoopTask

EPOCHS, BATCH, BUDGET = 20, 32, 8.0  # the budget of jel.fit is in runs


def data(seed: int) -> list[TensorDataset]:
    """To train on, to choose by, and to test with: 264, 88 and 90 patients; target standardised."""
    x, y = load_diabetes(return_X_y=True, scaled=True)
    order = torch.randperm(442, generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(x * 21, dtype=torch.float32)[order], torch.tensor((y - 152) / 77, dtype=torch.float32)[order]
    return [TensorDataset(x[a:b], y[a:b]) for a, b in ((0, 264), (264, 352), (352, 442))]


class Regression(lightning.LightningModule):
    def __init__(self, make_optimizer=None, make_scheduler=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
        self.make_optimizer, self.make_scheduler = make_optimizer, make_scheduler

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return loss(self, batch)

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.log("loss", loss(self, batch), on_epoch=True, batch_size=len(batch[1]))

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self)
        return step_schedule(optimizer, self.make_scheduler(optimizer, self.trainer.estimated_stepping_batches))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def make_task(seed: int = 0) -> LoopTask:
    train, probe, _ = data(seed)
    batches = DataLoader(train, BATCH, shuffle=True)
    steps = EPOCHS * len(batches)
    return LoopTask(Regression, make_optimizer, batches, loss, DataLoader(probe, 64), steps=steps, seed=seed)


def run(make_optimizer, make_scheduler, seed: int, split: int = 2) -> float:
    """Train from scratch; the loss on the test data (split 2) or on the probe data (split 1)."""
    torch.manual_seed(seed)
    sets, module = data(seed), Regression(make_optimizer, make_scheduler)
    quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger"), False)
    trainer = lightning.Trainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=[JelCallback()], **quiet)
    trainer.fit(module, DataLoader(sets[0], BATCH, shuffle=True))
    return trainer.test(module, DataLoader(sets[split], 64), verbose=False)[0]["loss"]


if __name__ == "__main__":
    learned = jel.fit(make_task(), budget=BUDGET)
    for name, schedule in (("AdamW as it is", jel.schedules.constant(1.0)), ("with JEL", learned.schedule)):
        print(f"{name}: test loss {run(make_optimizer, lambda o, n, s=schedule: jel.Scheduler(o, n, s), 0):.4f}")
