"""The base schedule, and the schedule-free optimizer that needs none."""

from __future__ import annotations

import copy

import pytest
import schedulefree
import torch
import torch.nn as nn

from nanochat.lr_schedule import base_hparams, lr_factor, muon_momentum, wd_factor
from nanochat.optim import MuonAdamW
from nanochat.schedule_free import ScheduleFreeMuon

T = 200


def lr_curve(warmup, warmdown, final):
    return [lr_factor(step, T, warmup, warmdown, final) for step in range(T + 1)]


# -----------------------------------------------------------------------------
# base schedule


def test_the_papers_schedule_is_flat_then_falls_linearly_to_zero():
    curve = lr_curve(0.0, 0.4, 0.0)
    assert curve[:121] == [1.0] * 121  # flat up to 60%, that step included
    assert curve[121:] == pytest.approx([(T - step) / 80 for step in range(121, T + 1)])
    assert curve[T] == 0.0 and curve[T - 1] > 0  # the last step that is taken still moves


def test_warm_up_rises_linearly_to_one():
    curve = lr_curve(0.1, 0.4, 0.0)
    assert curve[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])  # never a step at rate 0
    assert curve[19:121] == [1.0] * 102


def test_warm_down_ends_at_the_final_fraction():
    curve = lr_curve(0.0, 0.5, 0.1)
    assert curve[100] == 1.0 and curve[150] == pytest.approx(0.55) and curve[T] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(curve, curve[1:]))


def test_no_warm_down_is_constant():
    assert lr_curve(0.0, 0.0, 0.0) == [1.0] * (T + 1)
    assert lr_curve(0.0, 0.4, 1.0) == pytest.approx([1.0] * (T + 1))


def test_weight_decay_falls_to_its_end_or_stays():
    assert [wd_factor(step, T, 0.0) for step in (0, 50, 100, T)] == pytest.approx([1.0, 0.75, 0.5, 0.0])
    assert [wd_factor(step, T, 1.0) for step in (0, 50, 100, T)] == [1.0] * 4
    assert wd_factor(T, T, 0.25) == pytest.approx(0.25)


def test_momentum_rises_over_300_steps():
    assert [muon_momentum(step, 561) for step in (0, 150, 300, 301, 10_000)] == pytest.approx(
        [0.85, 0.9, 0.95, 0.95, 0.95]
    )


def test_base_hparams_start_from_each_groups_initial_values():
    groups = [
        {"initial_lr": 0.3, "initial_wd": 0.0, "lr": 9.0, "weight_decay": 9.0},
        {"initial_lr": 0.02, "initial_wd": 0.8, "lr": 9.0, "weight_decay": 9.0},
    ]
    before = copy.deepcopy(groups)
    found = base_hparams(groups, 160, T, warmup_ratio=0.0, warmdown_ratio=0.4, final_lr_frac=0.0, final_wd_frac=0.0)
    assert [h["lr"] for h in found] == pytest.approx([0.15, 0.01])
    assert [h["weight_decay"] for h in found] == pytest.approx([0.0, 0.16])
    assert groups == before  # writing is the hook's business


def test_a_shorter_run_ramps_the_momentum_over_the_same_share_of_itself():
    assert [muon_momentum(k, 187) for k in range(0, 101, 10)] == pytest.approx(
        [muon_momentum(3 * k, 561) for k in range(0, 101, 10)]
    )
    assert muon_momentum(150, 5610) == muon_momentum(150, 561)  # a longer one keeps the 300 steps


def test_momentum_is_a_base_value_of_muon_groups_alone():
    groups = [
        {"kind": "muon", "initial_lr": 1.0, "initial_wd": 0.0},
        {"kind": "adamw", "initial_lr": 1.0, "initial_wd": 0.0},
    ]
    muon, adamw = base_hparams(groups, 150, 561, 0.0, 0.4, 0.0, 0.0)
    assert muon["momentum"] == pytest.approx(0.9) and "momentum" not in adamw


def make(seed: int = 0, **hyper) -> ScheduleFreeMuon:
    """Two tensors in two AdamW groups, and a Muon stack of two."""
    g = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(*shape, generator=g)) for shape in [(5, 3), (4,), (6, 4), (6, 4)]]
    adamw = {"kind": "adamw", "lr": 123.0, "weight_decay": 45.0, "betas": (0.1, 0.2), "eps": 1.0}
    groups = [
        {"name": "a", "params": params[:1], **adamw},
        {"name": "b", "params": params[1:2], **adamw},
        {
            "name": "m",
            "params": params[2:],
            "kind": "muon",
            "lr": 0.02,
            "weight_decay": 0.2,
            "momentum": 0.9,
            "beta2": 0.95,
        },
    ]
    return ScheduleFreeMuon(groups, **{"lr": 0.05, "weight_decay": 0.1, "warmup_steps": 3, **hyper})


def params_of(optimizer):
    return [*optimizer.params, *optimizer.muon.param_groups[0]["params"]]


def gradient(step, i, p):
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)) + p.detach()


def train(optimizer, *steps):
    for step in steps:
        for i, p in enumerate(params_of(optimizer)):
            p.grad = gradient(step, i, p)
        optimizer.step()


def values(optimizer):
    return [p.detach().clone() for p in params_of(optimizer)]


def test_adamw_part_is_the_packages_with_its_rate_and_muon_part_is_muons():
    """The groups' own rates, made for AdamW with a schedule, play no part."""
    ours, start = make(), values(make())
    free = [nn.Parameter(p) for p in start[:2]]
    package = schedulefree.AdamWScheduleFree(free, lr=0.05, weight_decay=0.1, warmup_steps=3)
    package.train()
    matrices = [nn.Parameter(p) for p in start[2:]]
    muon = MuonAdamW([{**ours.param_groups[0], "params": matrices}])
    for step in range(6):
        train(ours, step)
        for i, p in enumerate([*free, *matrices]):
            p.grad = gradient(step, i, p)
        package.step()
        muon.step()
    assert all(torch.equal(a, b) for a, b in zip(params_of(ours), [*free, *matrices]))


@pytest.mark.parametrize("betas", [None, (0.95, 0.99)])
def test_betas_are_the_packages_unless_given(betas):
    ours, start = make(**({} if betas is None else {"betas": betas})), values(make())
    free = [nn.Parameter(p) for p in start[:2]]
    package = schedulefree.AdamWScheduleFree(
        free, lr=0.05, weight_decay=0.1, warmup_steps=3, **({} if betas is None else {"betas": betas})
    )
    package.train()
    for step in range(4):
        train(ours, step)
        for i, p in enumerate(free):
            p.grad = gradient(step, i, p)
        package.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.params, free))


@pytest.mark.parametrize("betas", [(0.0, 0.9), (0.9, 1.0), (float("nan"), 0.9)])
def test_betas_outside_0_to_1_are_refused(betas):
    with pytest.raises(ValueError, match="betas"):
        make(betas=betas)


def test_a_schedule_may_set_rate_decay_and_momentum_of_muon():
    plain, scheduled, rate = make(), make(), torch.zeros(())
    scheduled.param_groups[0]["lr"] = rate
    for step in range(3):
        plain.param_groups[0].update(lr=0.5**step, weight_decay=0.1 * step, momentum=0.85 + 0.01 * step)
        scheduled.param_groups[0].update(weight_decay=0.1 * step, momentum=0.85 + 0.01 * step)
        rate.fill_(0.5**step)
        train(plain, step)
        train(scheduled, step)
    assert all(torch.equal(a, b) for a, b in zip(values(plain), values(scheduled)))
    assert not torch.equal(values(plain)[2], values(make())[2])


def test_evaluated_weights_differ_from_trained_ones_and_come_back():
    optimizer = make()
    train(optimizer, 0, 1, 2, 3)
    trained = values(optimizer)
    optimizer.eval()
    evaluated = values(optimizer)
    assert [torch.allclose(a, b, atol=1e-4) for a, b in zip(trained, evaluated)] == [False, False, True, True]
    optimizer.eval()  # asking twice changes nothing
    assert all(torch.equal(a, b) for a, b in zip(evaluated, values(optimizer)))
    optimizer.train()
    for a, b in zip(trained, values(optimizer)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_evaluated_weights_are_the_average_of_the_fast_ones():
    """Without warm-up the package's x is the plain mean of its z over the steps."""
    optimizer, fast = make(warmup_steps=0), []
    for step in range(5):
        train(optimizer, step)
        fast.append(optimizer.state_dict()["free"]["0.z"])
    optimizer.eval()
    torch.testing.assert_close(params_of(optimizer)[0].data, torch.stack(fast).mean(0), rtol=1e-4, atol=1e-5)


def test_no_step_in_eval_mode():
    optimizer = make()
    train(optimizer, 0)
    optimizer.eval()
    with pytest.raises(Exception, match="train mode"):
        train(optimizer, 1)


@pytest.mark.parametrize("at", [0, 2, 5])
def test_state_resumes_bit_for_bit(at):
    """Saved before the first step, within the warm-up and after it, through a copy such as a checkpoint makes."""
    straight, first, second = make(), make(), make(seed=9)
    train(straight, *range(8))
    train(first, *range(at))
    for p, q in zip(params_of(second), params_of(first)):
        p.data.copy_(q)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, *range(at, 8))
    straight.eval()
    second.eval()
    assert all(torch.equal(a, b) for a, b in zip(params_of(straight), params_of(second)))


def test_a_controller_and_a_schedule_see_the_muon_groups_only():
    assert [g["name"] for g in make().param_groups] == ["m"]


def test_closure():
    optimizer = make()

    def closure():
        loss = sum(p.square().sum() for p in params_of(optimizer))
        loss.backward()
        return loss

    before = values(optimizer)
    assert optimizer.step(closure).item() == pytest.approx(sum(b.square().sum().item() for b in before), rel=1e-5)
    assert not any(torch.equal(b, p) for b, p in zip(before, params_of(optimizer)))


@pytest.mark.parametrize(
    "damage",
    [
        lambda free: free.pop("1.z"),
        lambda free: free.update({"7.z": torch.zeros(4)}),
        lambda free: free.update({"1.z": torch.zeros(3)}),
    ],
)
def test_state_that_does_not_fit(damage):
    optimizer = make()
    train(optimizer, 0)
    state = optimizer.state_dict()
    damage(state["free"])
    with pytest.raises(ValueError, match="schedule-free state"):
        optimizer.load_state_dict(state)
