"""Accelerate: one step of the scheduler per optimizer step; state saved and loaded with the accelerator's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

accelerate = pytest.importorskip("accelerate")

import jel  # noqa: E402
from jel.integrations.accelerate import observe, prepare_scheduler  # noqa: E402

STEPS = 6
SCHEDULE = jel.schedules.piecewise([(0.0, {"*": {"lr": 2.0}}), (0.5, {"*": {"lr": 0.5}})])
HELD = [2.0] * 3 + [0.5] * 3
X = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))


class Run:
    """A loop as in Accelerate's documentation: batches of 4, `accumulate` of them an optimizer step."""

    def __init__(self, accumulate: int = 1, schedule=SCHEDULE, controlled: bool = True):
        torch.manual_seed(0)
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        model = nn.Linear(4, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if controlled:
            self.scheduler = jel.Scheduler(self.optimizer, STEPS, schedule)
            self.prepared = prepare_scheduler(self.accelerator, self.scheduler)
        self.rates: list[float] = []

    def train(self, first: int, batches: int, told: bool = False) -> None:
        for i in range(first, first + batches):
            with self.accelerator.accumulate(self.model):
                loss = self.model(X[4 * i : 4 * i + 4]).square().mean()
                self.accelerator.backward(loss)
                if told:
                    observe(self.accelerator, self.prepared, loss)
                if self.accelerator.sync_gradients:
                    self.rates.append(self.optimizer.param_groups[0]["lr"])
                self.optimizer.step()
                if hasattr(self, "prepared"):
                    self.prepared.step()
                self.optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_is_an_optimizer_step(accumulate):
    run = Run(accumulate)
    run.train(0, accumulate * STEPS)
    assert run.rates == pytest.approx([1e-2 * m for m in HELD])
    assert run.scheduler.last_epoch == STEPS


def test_it_takes_one_step_whatever_the_number_of_processes(monkeypatch):
    monkeypatch.setattr(accelerate.state.AcceleratorState, "num_processes", property(lambda self: 8), raising=False)
    run = Run()
    run.train(0, STEPS)
    assert run.rates == pytest.approx([1e-2 * m for m in HELD]) and run.scheduler.last_epoch == STEPS


def test_ones_change_nothing():
    plain, controlled = Run(2, controlled=False), None
    plain.train(0, 2 * STEPS)
    controlled = Run(2, jel.schedules.constant(1.0))
    controlled.train(0, 2 * STEPS)
    assert all(map(torch.equal, plain.model.parameters(), controlled.model.parameters()))


def test_state_is_saved_and_loaded(tmp_path):
    whole = Run()
    whole.train(0, 2)
    whole.accelerator.save_state(str(tmp_path))
    whole.train(2, 4)
    resumed = Run()
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(2, 4)
    assert whole.rates[2:] == resumed.rates
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))


def test_a_controller_is_told_the_loss():
    class Watching(jel.Controller):
        observes = frozenset({"train_loss"})
        seen: list[float] = []

        def decide(self, observation):
            self.seen.append(observation["train_loss"])
            return {"*": {"lr": 1.0}}

    run = Run(schedule=Watching())
    run.train(0, STEPS, told=True)
    assert len(Watching.seen) >= STEPS and all(loss > 0 for loss in Watching.seen[1:])


def test_bad_input_is_one_line():
    run = Run(controlled=False)
    foreign = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(jel.JelError, match="prepare the optimizer first"):
        prepare_scheduler(run.accelerator, jel.Scheduler(foreign, STEPS, SCHEDULE))
    with pytest.raises(jel.JelError, match="needs a jel.Scheduler"):
        observe(run.accelerator, torch.optim.lr_scheduler.ConstantLR(foreign), torch.tensor(1.0))
