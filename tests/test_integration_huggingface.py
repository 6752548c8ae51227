"""The Hugging Face Trainer under a schedule: rates, resuming, accumulation, and multipliers in its log."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import jel  # noqa: E402
from jel.integrations.huggingface import JelCallback, control  # noqa: E402
from jel.tracking import Tracker, read_records  # noqa: E402

STEPS = 8
SCHEDULE = jel.schedules.piecewise([(0.0, {"*": {"lr": 2.0}}), (0.5, {"*": {"lr": 0.5, "weight_decay": 3.0}})])
X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
ROWS = [{"x": x, "labels": torch.tensor(float(i % 3))} for i, x in enumerate(X)]
HELD = [2.0] * 4 + [0.5] * 4  # in each step


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.dropout = nn.Linear(4, 1), nn.Dropout(0.2)

    def forward(self, x, labels):
        out = self.net(self.dropout(x)).squeeze(-1)
        return {"loss": (out - labels).square().mean(), "logits": out}


def make_trainer(folder: Path, optimizers=(None, None), callbacks=None, **more):
    torch.manual_seed(0)
    own = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {
        "logging_strategy": "steps",
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
    }
    args = transformers.TrainingArguments(str(folder), **{**quiet, **own, **more})
    model = Net()
    if optimizers != (None, None):
        optimizers = optimizers(model)
    return transformers.Trainer(model, args, train_dataset=ROWS, optimizers=optimizers, callbacks=callbacks)


def own_pair(schedule, steps: int = STEPS):
    def make(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return optimizer, jel.Scheduler(optimizer, steps, schedule)

    return make


def weights(trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def logged(trainer, key: str) -> list[float]:
    return [record[key] for record in trainer.state.log_history if key in record]


def test_ones_change_nothing(tmp_path):
    plain = make_trainer(tmp_path)
    plain.train()
    controlled = make_trainer(tmp_path)  # under the seed again
    control(controlled, jel.schedules.constant(1.0))
    controlled.train()
    assert all(map(torch.equal, weights(plain), weights(controlled)))
    assert logged(plain, "learning_rate") == logged(controlled, "learning_rate")


def test_the_trainers_own_schedule_is_multiplied(tmp_path):
    plain, controlled = (make_trainer(tmp_path, warmup_steps=2, lr_scheduler_type="cosine") for _ in range(2))
    callback = control(controlled, SCHEDULE)
    for trainer in (plain, controlled):
        trainer.train()
    base = logged(plain, "learning_rate")
    assert base[0] == 0.0 and len(set(base)) > 4
    assert logged(controlled, "learning_rate") == pytest.approx([b * m for b, m in zip(base, HELD)])
    assert logged(controlled, "jel/0/lr") == HELD and callback.scheduler.total_steps == STEPS


def test_an_optimizer_of_ones_own(tmp_path):
    trainer = make_trainer(tmp_path, own_pair(SCHEDULE), [JelCallback()])
    trainer.train()
    assert logged(trainer, "learning_rate") == pytest.approx([1e-2 * m for m in HELD])
    assert trainer.optimizer.param_groups[0]["weight_decay"] == pytest.approx(3e-2)


@pytest.mark.parametrize("own", [True, False])
def test_resuming_goes_on_exactly(own, tmp_path):
    def make(folder, steps):
        options = {"save_strategy": "steps", "save_steps": 3, "seed": 5}
        trainer = make_trainer(folder, own_pair(SCHEDULE) if own else (None, None), **options)
        if not own:
            control(trainer, SCHEDULE)
        return trainer

    whole = make(tmp_path, STEPS)
    whole.train()
    resumed = make(tmp_path, STEPS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == STEPS and resumed.lr_scheduler.last_epoch == STEPS
    assert all(map(torch.equal, weights(whole), weights(resumed)))
    assert whole.lr_scheduler.state_dict() == resumed.lr_scheduler.state_dict()


def test_accumulation_counts_optimizer_steps(tmp_path):
    trainer = make_trainer(tmp_path, own_pair(SCHEDULE), [JelCallback()], gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.lr_scheduler.last_epoch == STEPS
    assert logged(trainer, "jel/0/lr") == HELD


def test_a_controller_that_watches_is_told_the_loss(tmp_path):
    class Watching(jel.Controller):
        observes = frozenset({"train_loss"})
        seen: list[float] = []

        def decide(self, observation):
            self.seen.append(observation["train_loss"])
            return {"*": {"lr": 1.0}}

    def make(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        return optimizer, jel.Scheduler(optimizer, STEPS, Watching(), interval=3)

    with Tracker(tmp_path / "log") as tracker:
        trainer = make_trainer(tmp_path, make, [JelCallback(tracker)])
        trainer.train()
    assert Watching.seen[1:] == pytest.approx([logged(trainer, "loss")[i] for i in (1, 4)], rel=1e-3)
    records = read_records(tmp_path / "log")
    assert [r["train/loss"] for r in records if "train/loss" in r] == logged(trainer, "loss")


def test_a_guard_of_validation_is_told_the_evaluations(tmp_path):
    guards = []

    def make(model):
        optimizer = torch.optim.AdamW(model.parameters())
        guards.append(jel.ValidationGuard.of(model))
        return optimizer, jel.Scheduler(optimizer, STEPS, "lhopt", interval=3, guard=guards[0])

    trainer = make_trainer(tmp_path, make, [JelCallback()])
    trainer.args.eval_strategy, trainer.args.eval_steps, trainer.eval_dataset = "steps", 2, ROWS
    trainer.train()
    seen = logged(trainer, "eval_loss")
    assert len(seen) > 2 and guards[0].best == pytest.approx(min(seen))


def test_a_schedule_refuses_a_base_that_it_was_not_learned_under(tmp_path):
    optimizer = torch.optim.AdamW(Net().parameters(), lr=1e-2, weight_decay=0.0)
    contract = jel.Contract.of(optimizer, STEPS)
    learned = jel.make_schedule([{"progress": 0.0, "multipliers": {"*": {"lr": 2.0}}}], "a test", contract)
    decaying, flat = (make_trainer(tmp_path, lr_scheduler_type=kind) for kind in ("linear", "constant"))
    for trainer in (decaying, flat):
        control(trainer, learned)
    with pytest.raises(jel.JelError, match="learned over the base schedule constant"):
        decaying.train()
    flat.train()
    assert logged(flat, "learning_rate") == pytest.approx([2e-2] * STEPS)


def test_bad_input_is_one_line(tmp_path):
    trainer = make_trainer(tmp_path)
    control(trainer, {"format": "something else"})
    with pytest.raises(jel.JelError, match="not a jel-schedule"):
        trainer.train()
