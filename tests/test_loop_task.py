"""Anyone's loop as episodes: batched = in workers = one after another = a loop written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from jel import JelError
from jel.tasks.loop import LoopTask
from jel.tasks.loop_plain import seed_of
from tests.loop_parts import (
    classes,
    cosine,
    cross_entropy,
    make_adam,
    make_adamw,
    make_net,
    make_rmsprop,
    make_sgd,
    net_task,
)

MULTIPLIERS = {"*": {"lr": torch.tensor([0.3, 1.0, 4.0]), "weight_decay": torch.tensor([2.0, 1.0, 0.5])}}
GROUP = 5
MEASURED = ["probe_loss", "train_loss", "grad_norm"]


def by_hand(make_optimizer, lr: float, weight_decay: float, steps: int, clip: float | None) -> list[float]:
    """The slow twin: what a person would write. Probe loss, last training loss, last gradient norm."""
    torch.manual_seed(seed_of(0, "model", GROUP))
    model = make_net()
    optimizer = make_optimizer(model)
    scheduler = cosine(optimizer, steps)
    data, start = classes(), seed_of(0, "data", GROUP)
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    for step in range(steps):
        rates = scheduler.get_last_lr()
        for group, rate, decay in zip(optimizer.param_groups, rates, decays):
            group["lr"], group["weight_decay"] = rate * lr, decay * weight_decay
        optimizer.zero_grad()
        loss = cross_entropy(model, data[(start + step) % len(data)])
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip if clip else float("inf"))
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate  # as the scheduler left it
        scheduler.step()
    with torch.no_grad():
        probe = torch.stack([cross_entropy(model.eval(), batch) for batch in classes(64, seed=1)]).mean()
    return [float(probe), float(loss.detach()), float(norm)]


def end_of(task: LoopTask, pieces: tuple[int, ...] = (12,)) -> dict[str, torch.Tensor]:
    task.reset(GROUP, range(3))
    first = 0
    for steps in pieces:
        task.train(first, steps, MULTIPLIERS)
        first += steps
    found = task.observe(MEASURED)
    task.close()
    return found


@pytest.mark.parametrize("make_optimizer", [make_adamw, make_adam, make_sgd])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_every_way_is_the_loop_written_by_hand(make_optimizer, clip):
    ways = ["plain", "batched"] + ["workers"] * (make_optimizer is make_adamw and clip is None)
    expected = torch.tensor(
        [by_hand(make_optimizer, float(lr), float(wd), 12, clip) for lr, wd in zip(*MULTIPLIERS["*"].values())]
    )
    for way in ways:
        task = net_task(make_optimizer, make_scheduler=cosine, clip_norm=clip, episodes=way, workers=2)
        found = torch.stack(list(end_of(task).values()), dim=1)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=lambda m, way=way: f"{way}: {m}")


@pytest.mark.parametrize("way", ["plain", "batched"])
def test_an_episode_depends_on_its_group_and_not_on_what_ran_before(way):
    task = net_task(episodes=way)
    first = end_of(task)
    task.reset(2, range(3))
    task.train(0, 3, MULTIPLIERS)
    assert all(torch.equal(first[name], again) for name, again in end_of(task, (5, 7)).items())
    task.reset(2, range(3))
    task.train(0, 12, MULTIPLIERS)
    assert not torch.equal(first["probe_loss"], task.observe(["probe_loss"])["probe_loss"])


@pytest.mark.parametrize("way", ["plain", "batched"])
def test_the_programs_own_random_numbers_go_on_as_if_nothing_happened(way):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    end_of(net_task(episodes=way))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("way", ["plain", "batched"])
def test_save_and_load_bring_back_some_episodes(way):
    task = net_task(episodes=way)
    task.reset(0, range(3))
    task.train(0, 4, MULTIPLIERS)
    there, chosen = task.observe(["probe_loss"])["probe_loss"], torch.tensor([True, False, True])
    task.save(0, chosen)
    task.train(4, 4, MULTIPLIERS)
    later = task.observe(["probe_loss"])["probe_loss"]
    task.load(0, chosen)
    assert torch.equal(task.observe(["probe_loss"])["probe_loss"], torch.where(chosen, there, later))
    with pytest.raises(JelError, match="slot 7"):
        task.load(7, chosen)


def test_dropout_is_shared_by_the_episodes_of_a_group():
    """So that what differs between their returns is what their actions did."""
    task = net_task(make_model=DropoutNet(), episodes="plain")
    task.reset(0, range(2))
    task.train(0, 6, {"*": {"lr": torch.ones(2)}})
    losses = task.observe(["train_loss"])["train_loss"]
    assert losses[0] == losses[1]


class DropoutNet:
    def __call__(self) -> nn.Module:
        return make_net(dropout=0.5)


@pytest.mark.parametrize(
    "choices, reason",
    [
        ({"make_optimizer": make_rmsprop}, "RMSprop"),
        ({"make_model": DropoutNet()}, "random"),
        ({"make_model": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))}, "state"),
        ({"make_model": lambda: Half()}, "no gradient"),
    ],
)
def test_what_cannot_be_batched_says_why(choices, reason):
    task = net_task(**{"episodes": "auto", "workers": 1, **choices})
    assert task.way.engine == "plain" and reason in str(task.way) and "\n" not in str(task.way)
    with pytest.raises(JelError, match=reason):
        _ = net_task(**{"episodes": "batched", **choices}).way


class Half(nn.Module):
    """A layer that takes no part: torch's optimizers leave it alone, a batched one would let it decay."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_batches_from_a_loader_a_list_and_a_function():
    data = torch.utils.data.TensorDataset(*(torch.cat(column) for column in zip(*classes())))
    loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
    assert net_task(batches=loader, steps=None).steps == len(loader)
    for batches in (loader, classes(), lambda seed: iter(classes(32, seed % 100))):
        first, second = (end_of(net_task(batches=batches, episodes=way)) for way in ("plain", "batched"))
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_a_short_run_has_the_whole_base_schedule():
    task = net_task(make_scheduler=cosine).with_steps(4)
    task.reset(0, range(1))
    task.train(0, 3, {"*": {"lr": torch.ones(1)}})
    before = task.observe(["probe_loss"])
    task.train(3, 1, {"*": {"lr": torch.full((1,), 1e-9)}})
    assert torch.allclose(before["probe_loss"], task.observe(["probe_loss"])["probe_loss"])
    assert task.contract.schedule == "CosineAnnealingLR"


class Fickle:
    """Every optimizer has another learning rate."""

    made = -1

    def __call__(self, model: nn.Module) -> torch.optim.Optimizer:
        self.made += 1
        return torch.optim.SGD(model.parameters(), lr=0.1 * 2.0**self.made)


def nan_loss(model: nn.Module, batch: tuple) -> torch.Tensor:
    return cross_entropy(model, batch) * float("nan")


def momentum_too(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)


@pytest.mark.parametrize(
    "choices, message",
    [
        ({"probe": []}, "no probe data"),
        ({"probe": 3}, "probe must be"),
        ({"loss": nan_loss}, "probe loss is nan before"),
        ({"loss": lambda model, batch: model(batch)}, "first step of the loop fails"),
        ({"make_optimizer": Fickle()}, "groups change between episodes"),
        ({"make_optimizer": lambda model: 3}, "make_optimizer gave int"),
        ({"make_model": lambda: 3}, "make_model gave int"),
        ({"make_model": 3}, "make_model must be a function"),
        ({"make_model": make_net()}, "not a model: every episode has its own"),
        ({"make_optimizer": lambda model: make_adam(make_net())}, "other parameters than the model's"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0"),
        ({"workers": "x"}, "workers is 'x'"),
        ({"batches": iter([])}, "every episode begins anew"),
        ({"batches": []}, "no training batches"),
        ({"batches": lambda seed: [], "steps": None}, "give steps="),
        ({"steps": 0}, "steps is 0"),
        ({"episodes": "quickly"}, "episodes is 'quickly'"),
        ({"make_scheduler": momentum_too, "make_optimizer": make_sgd}, "cycle_momentum=False"),
    ],
)
def test_bad_input_is_one_clear_line(choices, message):
    with pytest.raises(JelError, match=message) as caught:
        net_task(**choices)
    assert "\n" not in str(caught.value)


def test_groups_of_one_name_are_refused():
    named = lambda model: torch.optim.SGD([{"params": [p], "name": "same"} for p in model.parameters()], lr=0.1)
    with pytest.raises(JelError, match="must differ"):
        net_task(named)
