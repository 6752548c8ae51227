"""Lightning: the interval "step", accumulation, resuming from a checkpoint, multipliers in the log."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning")

import jel  # noqa: E402
from jel.integrations.lightning import JelCallback, step_schedule, total_steps  # noqa: E402

STEPS = 8
SCHEDULE = jel.schedules.piecewise([(0.0, {"*": {"lr": 2.0}}), (0.5, {"*": {"lr": 0.5}})])
HELD = [2.0] * 4 + [0.5] * 4
X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore")


class Module(lightning.LightningModule):
    def __init__(self, schedule=SCHEDULE, interval: str = "step"):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.schedule, self.interval, self.rates, self.losses = nn.Linear(4, 1), schedule, interval, [], []

    def training_step(self, batch, index):
        loss = self.net(batch[0]).square().mean()
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        if self.schedule is None:
            return optimizer
        options = {"interval": 1} if isinstance(self.schedule, jel.Controller) else {}
        scheduler = jel.Scheduler(optimizer, total_steps(self.trainer), self.schedule, **options)
        configured = step_schedule(optimizer, scheduler)
        configured["lr_scheduler"]["interval"] = self.interval
        return configured


def fit(module, folder, callbacks=(), resume=None, batch=4, **options):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    own = {"max_steps": STEPS, "enable_checkpointing": False, "default_root_dir": folder, "log_every_n_steps": 1}
    trainer = lightning.Trainer(callbacks=list(callbacks), **{**quiet, **own, **options})
    trainer.fit(module, DataLoader(TensorDataset(X), batch), ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_is_an_optimizer_step(accumulate, tmp_path):
    module = Module()
    trainer = fit(module, tmp_path, [JelCallback()], accumulate_grad_batches=accumulate)
    assert module.rates == pytest.approx([1e-2 * m for m in HELD])
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == STEPS


def test_the_length_is_the_trainers(tmp_path):
    module = Module()
    fit(module, tmp_path, max_steps=-1, max_epochs=1)
    assert module.rates == pytest.approx([1e-2 * m for m in HELD])
    with pytest.raises(jel.JelError, match="how long is this run"):
        fit(Module(), tmp_path, max_steps=-1, max_epochs=-1)


def test_ones_change_nothing(tmp_path):
    plain, controlled = Module(None), Module(jel.schedules.constant(1.0))
    for module in (plain, controlled):
        fit(module, tmp_path, [JelCallback()])
    assert all(map(torch.equal, plain.parameters(), controlled.parameters()))


def test_resuming_goes_on_exactly(tmp_path):
    saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    whole = Module()
    fit(whole, tmp_path, [saving], batch=32, enable_checkpointing=True)  # an epoch a step
    resumed = Module()
    fit(resumed, tmp_path, batch=32, resume=str(next(tmp_path.glob("*step=3.ckpt"))))
    assert resumed.rates == whole.rates[3:]
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


def test_multipliers_are_logged_and_losses_told(tmp_path):
    class Watching(jel.Controller):
        observes = frozenset({"train_loss"})
        seen: list[float] = []

        def decide(self, observation):
            self.seen.append(observation["train_loss"])
            return {"*": {"lr": 1.0 + len(self.seen)}}

    module = Module(Watching())
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path)
    fit(module, tmp_path, [JelCallback()], logger=logger, accumulate_grad_batches=2)
    assert Watching.seen[1:] == pytest.approx(module.losses[1 : 2 * STEPS : 2][: len(Watching.seen) - 1])
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert "jel/0/lr" in rows[0].split(",") and len(rows) == 1 + STEPS


def test_an_interval_of_epochs_is_refused(tmp_path):
    with pytest.raises(jel.JelError, match="stepped every epoch; give it interval='step'"):
        fit(Module(interval="epoch"), tmp_path, [JelCallback()])
