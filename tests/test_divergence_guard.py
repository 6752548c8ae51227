"""A run recovers from NaNs, a thousandfold learning rate and poisoned batches, or because its controller asks."""

from __future__ import annotations

import json
import math
import signal
import sys

import pytest
import safetensors.torch
import torch

from jel.controller import Controller, Decision
from nanochat.common import UserError
from nanochat.dataloader import DataLoader
from nanochat.gpt import GPT
from nanochat.run_log import MEASURED
from scripts import base_train
from scripts.training_log import TrainingLog
from scripts.update_judge import UpdateJudge

STEPS, SAVE_EVERY = 60, 10
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# -----------------------------------------------------------------------------
# runs


class Leap(Controller):
    """A learning rate a thousandfold, at step 23 or from there on."""

    observes, last = frozenset({"step"}), 23

    def decide(self, observation):
        return {"*": {"lr": 1000.0 if 23 <= observation["step"] <= self.last else 1.0, "weight_decay": 1.0}}


class LeapAndStay(Leap):
    last = math.inf


class Halved(Controller):
    """Half the learning rate from a step on: what a run does that has gone back there after a divergence."""

    observes, first = frozenset({"step"}), 0

    def decide(self, observation):
        return {"*": {"lr": 0.5 if observation["step"] >= self.first else 1.0, "weight_decay": 1.0}}


class HalvedLater(Halved):
    first = 10


class Returns(Controller):
    """At step 27 it asks, once, to go back 8 steps, and halves the learning rate there. It counts its decisions."""

    observes = frozenset({"step", "train_loss", "grad_norm"})

    def __init__(self):
        self.steps, self.gone_back = [], False

    def decide(self, observation):
        self.steps.append(observation["step"])
        if observation["step"] == 27 and not self.gone_back:
            self.gone_back = True
            return Decision({"*": {"lr": 0.5}}, go_back=8)
        return {"*": {"lr": 0.5 if self.gone_back else 1.0}}

    def state_dict(self):
        return {"steps": self.steps, "gone_back": self.gone_back}

    def load_state_dict(self, state):
        self.steps, self.gone_back = list(state["steps"]), state["gone_back"]


class Insists(Controller):
    observes = frozenset({"step"})

    def decide(self, observation):
        return Decision({"*": {"lr": 1.0}}, go_back=0 if observation["step"] >= 12 else None)


class Killed(BaseException):
    pass


@pytest.fixture
def train(base, corpus, monkeypatch):
    """base_train in this process, on STEPS steps; its exit code."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))

    def run(tag, *flags):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "base_train",
                "--preset",
                "smoke",
                "--data",
                str(corpus),
                "--device-type",
                "cpu",
                "--num-iterations",
                str(STEPS),
                "--save-every",
                str(SAVE_EVERY),
                "--eval-every",
                "0",
                "--sample-tokens",
                "0",
                "--decision-interval",
                "1",
                "--model-tag",
                f"recovery/{tag}",
                *flags,
            ],
        )
        return base_train.main()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def disturb(monkeypatch):
    """`disturb(at, do)`: at the given calls of the model with gradients (2 a step), `do(model)` changes the loss."""
    forward, calls = GPT.forward, []

    def install(at, do):
        def disturbed(self, idx, targets=None, **options):
            loss = forward(self, idx, targets, **options)
            if torch.is_grad_enabled():
                calls.append(None)
                if len(calls) - 1 in at:
                    loss = do(self, loss)
            return loss

        monkeypatch.setattr(GPT, "forward", disturbed)

    return install


@pytest.fixture
def poison(monkeypatch):
    """`poison(steps, spoil)`: the training batches of those steps have `spoil(targets)` for targets."""
    get = DataLoader.get

    def install(steps, spoil):
        def poisoned(self, step, micro_step=0):
            inputs, targets = get(self, step, micro_step)
            return (inputs, spoil(targets)) if step in steps and self._rows.split == "train" else (inputs, targets)

        monkeypatch.setattr(DataLoader, "get", poisoned)

    return install


def left(base, tag):
    """(result, events, losses by step) of a run."""
    folder = base / "runs" / "recovery" / tag
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = {r["step"]: r["loss"] for r in log if "loss" in r}
    assert list(losses) == list(range(STEPS))  # every step once
    return json.loads((folder / "result.json").read_text()), [r["event"] for r in log if "event" in r], losses


@pytest.fixture
def undisturbed(base, train):
    """Bits per byte of the run that nothing happens to."""
    if not (base / "runs" / "recovery" / "calm" / "result.json").exists():
        assert train("calm") == 0
    result, events, _ = left(base, "calm")
    assert not events
    return result["val_bpb"]


def weights(base, tag):
    return safetensors.torch.load_file(base / "runs" / "recovery" / tag / "model.safetensors")


def assert_same_weights(base, a, b):
    a, b = weights(base, a), weights(base, b)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def timeless(base, tag):
    """The run's log without times, as text (NaN is not equal to NaN)."""
    lines = (base / "runs" / "recovery" / tag / "log.jsonl").read_text().splitlines()
    return [repr({k: v for k, v in json.loads(line).items() if k not in MEASURED}) for line in lines]


def break_weights(model, loss):
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    return loss


def break_gradient(model, loss):
    hook = model.lm_head.weight.register_hook(lambda gradient: (hook.remove(), gradient * math.nan)[1])
    return loss


@pytest.mark.parametrize("step, back, twin", [(23, 10, "HalvedLater"), (3, 0, "Halved")])
def test_broken_weights_are_replaced_and_the_rates_halved(base, train, disturb, step, back, twin):
    """From the checkpoint on it is, bit for bit, the run that a controller halves there."""
    assert train("halved", "--controller", f"tests.test_divergence_guard:{twin}") == 0
    disturb([2 * step], break_weights)
    assert train("nan") == 0
    result, events, _ = left(base, "nan")
    assert events == [
        f"step {step}: loss nan is a divergence: learning-rate multipliers are capped at 0.5; "
        f"back from step {step} to step {back}"
    ]
    assert result["recoveries"] == 1
    assert_same_weights(base, "halved", "nan")
    halved = left(base, "halved")[0]  # what was spent on the way is counted: the lost steps, and one look at a batch
    step_flops = halved["flops"] / (STEPS + 1024 / 256 / 3 * 2)
    assert result["flops"] - halved["flops"] == pytest.approx(step_flops * (step + 1 - back + 1 / 3), rel=1e-6)


@pytest.mark.parametrize(
    "at, words",
    [
        ([46], ["step 23: loss nan is a spike, but the weights do well on the last good batch"]),
        ([0, 20], ["step 0: loss nan is a spike", "step 10: loss nan is a spike"]),
    ],
)
def test_broken_gradients_are_skipped(base, train, undisturbed, disturb, at, words):
    disturb(at, break_gradient)
    assert train("nan") == 0
    result, events, _ = left(base, "nan")
    assert len(events) == len(words) and all(event.startswith(word) for event, word in zip(events, words)), events
    assert result["val_bpb"] < undisturbed + 0.15 and result["recoveries"] == len(words)


def test_the_cap_is_half_of_what_did_the_damage(base, train):
    """A thousandfold rate at step 23 breaks the weights; it shows at step 24, where the controller is back at 1."""
    assert train("leap", "--controller", "tests.test_divergence_guard:Leap") == 0
    assert "step 24: " in left(base, "leap")[1][0] and "capped at 500;" in left(base, "leap")[1][0]


def test_a_controller_goes_back_once(base, train):
    """Back to step 10, the newest checkpoint 8 steps old: from there on it is the run that is halved at step 10."""
    assert train("halved", "--controller", "tests.test_divergence_guard:HalvedLater") == 0
    assert train("returns", "--controller", "tests.test_divergence_guard:Returns") == 0
    result, events, losses = left(base, "returns")
    halved = left(base, "halved")
    assert events == ["step 27: the controller asks to go back 8 steps; back from step 27 to step 10"]
    assert result["recoveries"] == 1 and result["steps"] == STEPS and losses == halved[2]
    assert_same_weights(base, "halved", "returns")
    assert result["decisions"] == STEPS - 1 + 28 - 10  # steps 10 to 27 came twice, but step 10 was decided at step 27


def test_killed_after_a_controller_went_back_and_resumed(base, train, monkeypatch):
    flags = ("--controller", "tests.test_divergence_guard:Returns", "--resume", "auto")
    assert train("returned", *flags) == 0
    get, deaths = DataLoader.get, [15, 26, 13, 22, 41]  # 13: it has gone back, and nothing is saved since

    def deadly(self, step, micro_step=0):
        if deaths and step == deaths[0] and self._rows.split == "train" and torch.is_grad_enabled():
            if step != 13 or train.back:
                deaths.pop(0)
                raise Killed
        return get(self, step, micro_step)

    rewind = TrainingLog.rewind
    monkeypatch.setattr(TrainingLog, "rewind", lambda self, step: (setattr(train, "back", True), rewind(self, step)))
    monkeypatch.setattr(DataLoader, "get", deadly)
    train.back = False
    while deaths:
        with pytest.raises(Killed):
            train("torn-return", *flags)
    assert train("torn-return", *flags) == 0
    assert_same_weights(base, "returned", "torn-return")
    assert timeless(base, "returned") == timeless(base, "torn-return")
    whole, torn = (left(base, tag)[0] for tag in ("returned", "torn-return"))
    assert all(whole[key] == torn[key] for key in ("recoveries", "decisions", "flops", "val_bpb", "test_bpb"))


def test_a_controller_that_goes_back_too_often_is_stopped(train):
    with pytest.raises(UserError, match="step 12: the controller asks to go back, after 2 recoveries; allow more"):
        train("insists", "--controller", "tests.test_divergence_guard:Insists", "--max-recoveries", "2")


@pytest.mark.parametrize("controller", ["Leap", "LeapAndStay"])
def test_a_thousandfold_learning_rate(base, train, undisturbed, controller):
    assert train("leap", "--controller", f"tests.test_divergence_guard:{controller}") == 0
    result, events, losses = left(base, "leap")
    assert 1 <= len(events) <= 3 and all("divergence" in event for event in events), events
    assert max(list(losses.values())[40:]) < losses[0] and result["val_bpb"] < undisturbed + 0.3


@pytest.mark.parametrize(
    "steps, spoil",
    [
        ({0}, lambda targets: torch.full_like(targets, -1)),  # nothing to predict: the mean of no losses is NaN
        ({20, 21, 22}, lambda targets: torch.full_like(targets, -1)),
        ({55}, lambda targets: (targets + 150) % 300),  # nonsense, of a finite loss
    ],
)
@pytest.mark.parametrize("optimizer", ["muon-adamw", "schedule-free"])
def test_poisoned_batches_are_skipped(base, train, undisturbed, poison, steps, spoil, optimizer):
    poison(steps, spoil)
    assert train("poison", "--optimizer", optimizer, "--sf-lr", "0.1") == 0
    result, events, _ = left(base, "poison")
    assert [event.split(":")[0] for event in events] == [f"step {step}" for step in sorted(steps)], events
    assert all("its update is skipped" in event for event in events)
    assert optimizer != "muon-adamw" or result["val_bpb"] < undisturbed + 0.1


def test_off_and_giving_up_are_one_clear_line(base, train, poison, disturb):
    poison({20}, lambda targets: torch.full_like(targets, -1))
    with pytest.raises(UserError, match="diverged at step 20 .loss nan. and --max-recoveries is 0"):
        train("off", "--max-recoveries", "0")
    disturb(range(46, 2000), break_weights)
    with pytest.raises(UserError, match="after 3 recoveries; lower the learning rates"):
        train("lost", "--max-recoveries", "3")
    assert sorted(
        p.name for p in (base / "runs" / "recovery" / "lost" / "checkpoints").iterdir()
    )  # what was saved is there


def test_without_checkpoints_there_is_no_way_back(train, disturb):
    disturb([46], break_weights)
    with pytest.raises(UserError, match="no checkpoint to go back to; give --save-every"):
        train("nowhere", "--save-every", "0")


@pytest.mark.parametrize("save_every", ["10", "1"])
def test_killed_after_a_recovery_and_resumed_is_undisturbed(base, train, poison, monkeypatch, save_every):
    """A spike, a divergence, deaths before and after each of them: the same bits and the same log as without deaths."""
    flags = ("--controller", "tests.test_divergence_guard:Leap", "--save-every", save_every, "--resume", "auto")
    poison({12, 33}, lambda targets: torch.full_like(targets, -1))
    assert train(f"whole-{save_every}", *flags) == 0
    get, deaths = DataLoader.get, [11, 13, 24, 22, 34, 47]

    def deadly(self, step, micro_step=0):
        if deaths and step == deaths[0] and self._rows.split == "train" and torch.is_grad_enabled():
            deaths.pop(0)
            raise Killed
        return get(self, step, micro_step)

    monkeypatch.setattr(DataLoader, "get", deadly)
    while deaths:
        with pytest.raises(Killed):
            train(f"torn-{save_every}", *flags)
    assert train(f"torn-{save_every}", *flags) == 0

    assert_same_weights(base, f"whole-{save_every}", f"torn-{save_every}")
    logs = [timeless(base, f"{name}-{save_every}") for name in ("whole", "torn")]
    assert logs[0] == logs[1] and sum("'event'" in record for record in logs[0]) >= 3


# -----------------------------------------------------------------------------
# losses looked at one step late, as on a GPU


@pytest.fixture
def late(monkeypatch):
    """From its call on, runs look one step late."""

    def begin():
        monkeypatch.setattr(base_train, "UpdateJudge", lambda *parts, late: UpdateJudge(*parts, late=True))

    return begin


def test_a_quiet_run_looked_at_late_is_the_same_run(base, train, late):
    """The same bits and the same log, with pauses for decisions that observe the loss, validations and checkpoints."""
    flags = ("--controller", "tests.test_base_train:Doubler", "--num-iterations", "12", "--eval-every", "5")
    flags += ("--decision-interval", "4", "--save-every", "3")
    assert train("at-once", *flags) == 0
    late()
    assert train("late", *flags) == 0
    assert_same_weights(base, "at-once", "late")
    assert timeless(base, "at-once") == timeless(base, "late")


def test_broken_weights_seen_late_are_replaced_too(base, train, disturb, late):
    """The step under way is forgotten: from the checkpoint on it is the run that a controller halves there."""
    assert train("halved", "--controller", "tests.test_divergence_guard:HalvedLater") == 0
    disturb([46], break_weights)
    late()
    assert train("nan-late") == 0
    result, events, losses = left(base, "nan-late")
    assert result["recoveries"] == 1 and "step 23: loss nan is a divergence" in events[0] and "to step 10" in events[0]
    assert sorted(losses) == list(range(STEPS))
    assert_same_weights(base, "halved", "nan-late")


def test_a_broken_gradient_seen_late_has_done_no_harm(base, train, undisturbed, disturb, late):
    disturb([46], break_gradient)
    late()
    assert train("gradient-late") == 0
    result, events, _ = left(base, "gradient-late")
    assert len(events) == result["recoveries"] == 1 and events[0].startswith("step 23: loss nan is a spike")
    assert result["val_bpb"] < undisturbed + 0.15
