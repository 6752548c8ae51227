"""The guard that keeps the best weights on validation: what it goes back to, when, and what the end is."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import jel
from jel.errors import JelError
from jel.learn.control import Best
from jel.validation_guard import WORSE
from tests.lhopt_runs import Loop


def guarded(**options):
    """A loop whose guard keeps its weights, and the guard."""
    kept = {}
    guard = jel.ValidationGuard(
        save=lambda: {k: t.clone() for k, t in kept["model"].state_dict().items()},
        load=lambda state: kept["model"].load_state_dict(state),
        **options,
    )
    loop = Loop(guard=guard)
    kept["model"] = loop.model
    return loop, guard


def same(model, state):
    return all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_the_best_weights_on_validation_are_kept():
    loop, guard = guarded()
    states = []
    for step, val in enumerate((3.0, 1.0, 2.0, 1.4)):
        states.append({k: t.clone() for k, t in loop.model.state_dict().items()})
        loop.scheduler.observe(val_loss=torch.tensor(val))
        loop.train([step + 100])  # steps of other data, without a validation loss of their own
    assert guard.best == 1.0 and guard.tripped is None
    assert guard.load_best() == 1
    assert same(loop.model, states[1])


@pytest.mark.parametrize("how", ["far above", "not finite", "diverged"])
def test_a_run_that_leaves_its_best_behind_goes_back_to_it(how, capsys):
    loop, guard = guarded(every=1, retreats=0, **({"margin": 0.5} if how == "far above" else {}))
    loop.scheduler.observe(val_loss=1.0)
    best = {k: t.clone() for k, t in loop.model.state_dict().items()}
    loop.train(range(100, 110, 3))
    assert not same(loop.model, best) and loop.optimizer.param_groups[0]["lr"] != 1e-3
    if how == "diverged":
        loop.optimizer.step()
        loop.scheduler.observe(loss=float("nan"))
    else:
        for _ in range(2 if how == "far above" else 1):
            loop.optimizer.step()
            loop.scheduler.observe(loss=1.0, val_loss=1.6 if how == "far above" else float("inf"))
    loop.scheduler.step()
    assert same(loop.model, best)
    assert loop.optimizer.param_groups[0]["lr"] == 1e-3  # the base, to the end
    assert capsys.readouterr().out.count("back to the base, from the weights of step 0") == 1
    loop.train(range(120, 126))
    assert set(loop.rates[-6:]) == {1e-3}
    assert float(loop.controller._values[0]) == pytest.approx(1e-3)  # and the policy knows


def test_a_guard_of_a_model_keeps_parameters_and_buffers():
    model = nn.BatchNorm1d(2)
    guard = jel.ValidationGuard.of(model, patience=5, retreats=0)
    guard.start(10, ())
    guard.validated(1, 1.0)
    best = {k: t.clone() for k, t in model.state_dict().items()}
    with torch.no_grad():
        model.weight.add_(1)
        model.running_mean.sub_(1)
    guard.validated(2, 1.2)
    later = {k: t.clone() for k, t in model.state_dict().items()}
    assert not same(model, best)
    assert guard.load_best() == 1 and same(model, best) and guard.patience == 5
    told = iter((1.2, 1.3))
    assert guard.load_best(lambda: next(told)) == 1  # the mean validates as well as the second best
    for name, value in model.state_dict().items():
        mean = (best[name] + later[name]) / 2 if value.is_floating_point() else best[name]
        assert torch.equal(value, mean)
    assert guard.load_best(lambda: next(told)) == 1 and same(model, best)  # and here it does not
    with pytest.raises(StopIteration):
        next(told)


def test_a_run_worse_than_its_start_goes_back_and_on_at_lower_rates(capsys):
    loop, guard = guarded(retreats=2)
    group = loop.optimizer.param_groups[0]
    loop.scheduler.observe(val_loss=1.0)
    loop.train(range(100, 105))
    best = {k: t.clone() for k, t in loop.model.state_dict().items()}
    loop.scheduler.observe(val_loss=0.8)
    for i, loss in enumerate((1.09, 1.11, math.nan, 1.2)):
        loop.train(range(110 + 3 * i, 113 + 3 * i))
        rate, decay = group["lr"], group["weight_decay"]
        loop.scheduler.observe(val_loss=loss)
        back = i in (1, 2)  # not while it is within a tenth of the first, and not a third time
        assert same(loop.model, best) == back
        assert group["lr"] == pytest.approx(rate * 0.25 if back else rate) and group["weight_decay"] == decay
        assert float(loop.controller._values[0]) == pytest.approx(group["lr"])  # the policy goes on from there
    assert capsys.readouterr().out.count("back to the weights of step 5, rates x 0.25") == 2 and guard.tripped is None
    loop.train(range(130, 140))
    assert len(set(loop.rates[-10:])) > 2 and guard.load_best() == 5
    loop.scheduler.observe(val_loss=math.inf)
    assert guard.tripped  # none is left


class Twice(jel.Controller):
    """Of decay alone in the second group, so that a rate which no multiplier names is cut as well."""

    def decide(self, observation):
        rate = 2.0 if observation["progress"] < 0.5 else 3.0
        return jel.Decision({"0": {"lr": rate}, "1": {"weight_decay": 2.0}})


def two_groups():
    first, second = nn.Linear(4, 4), nn.Linear(4, 1)
    groups = [{"params": list(m.parameters())} for m in (first, second)]
    return nn.Sequential(first, second), torch.optim.AdamW(groups)


@pytest.mark.parametrize("bounds, cut, later", [(None, 0.5, 0.75), ((1.0, 4.0), 1.0, 1.0)])
def test_rates_stay_cut_within_the_users_bounds_and_are_recorded(bounds, cut, later):
    model, optimizer = two_groups()
    guard = jel.ValidationGuard.of(model)
    scheduler = jel.Scheduler(optimizer, 8, Twice(), interval=4, guard=guard, bounds=bounds)
    rates = []
    for step in range(8):
        scheduler.observe(val_loss=9.0 if step == 2 else 1.0)
        rates += [group["lr"] / 1e-3 for group in optimizer.param_groups]
        optimizer.step()
        scheduler.step()
    other = 0.25 if bounds is None else 1.0
    assert rates == pytest.approx([2.0, 1.0] * 2 + [cut, other] * 2 + [later, other] * 4)
    assert optimizer.param_groups[1]["weight_decay"] == pytest.approx(2e-2)
    decisions = scheduler.recorded()["decisions"]
    assert [d["multipliers"]["0"]["lr"] for d in decisions] == pytest.approx([2.0, cut, later])
    scheduler.observe(val_loss=math.nan)  # after the last step
    scheduler.recorded()
    for _ in range(9):
        scheduler.observe(val_loss=math.inf)
    assert guard.tripped and optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.25**6)  # the base's, as cut


def test_it_is_not_its_turn_before_a_sequential_scheduler_comes_to_it():
    model, optimizer = two_groups()
    guard = jel.ValidationGuard.of(model)
    warm = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 3)
    ours = jel.Scheduler(optimizer, 4, Twice(), interval=2, guard=guard)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, ours], milestones=[3])
    for step, loss in enumerate((1.0, 5.0, 5.0, 5.0, 6.0, 7.0)):
        ours.observe(val_loss=loss)
        assert guard.retreated == (step > 3) + (step > 4)
        optimizer.step()
        both.step()
    assert guard.first == 5.0


@pytest.mark.parametrize(
    "worse, losses, back",
    [
        (0.1, (math.nan, math.inf, 2.0, 1.9, 2.1, 2.3), 1),  # the first that is finite
        (math.inf, (0.0, 5.0, 1e9), 0),
        (0.0, (1.0, 1.0, 1.0 + 1e-6), 1),
    ],
)
def test_what_a_run_is_held_against(worse, losses, back):
    """The guard, and its batched twin of the training environment."""
    guard = jel.ValidationGuard(lambda: 0, lambda kept: None, worse=worse)
    guard.start(10, ())
    for step, loss in enumerate(losses):
        guard.validated(step, loss)
    assert guard.retreated == back and guard.tripped is None
    if worse == WORSE:
        best, put = Best(1, 5), []
        episodes = SimpleNamespace(put_back=lambda flat, which: put.append(bool(which)))
        for loss in losses:
            best.see(torch.zeros(1, 2), torch.tensor([loss]))
            best.retreat(episodes, torch.tensor([loss]))
        assert put == [True] * back


def test_one_event_costs_one_retreat_whatever_is_told_first():
    for order in (("val_loss", "loss"), ("loss", "val_loss")):
        loop, guard = guarded(every=1)
        loop.scheduler.observe(val_loss=1.0)
        loop.train(range(100, 104))
        loop.optimizer.step()
        for name in order:
            loop.scheduler.observe(**{name: math.nan})
        loop.scheduler.step()
        assert guard.retreated == 1 and guard.tripped is None


def test_after_resuming_it_does_not_go_back_to_what_is_no_better():
    loop, guard = guarded()
    loop.scheduler.observe(val_loss=1.0)
    loop.train(range(100, 103))
    kept = {name: x for name, x in guard.state_dict().items()}
    old = {name: x for name, x in kept.items() if name not in ("first", "retreated")}  # of a version without retreats
    for state, first in ((kept, 1.0), (old, 2.0)):
        other = jel.ValidationGuard(lambda: "copy", lambda copy: None)
        other.start(40, ())
        other.check_state(state)
        other.load_state_dict(state)
        for step, loss in enumerate((2.0, 1.9, 2.05)):
            other.validated(10 + step, loss)
        assert (other.first, other.retreated, other.tripped) == (first, 0, None)
        other.validated(20, 0.9)
        other.validated(21, 3.0)
        assert other.retreated == 1


def test_what_it_has_seen_survives_a_checkpoint():
    loop, guard = guarded()
    loop.scheduler.observe(val_loss=1.0)
    loop.train(range(100, 103))
    loop.scheduler.observe(val_loss=2.0)
    kept = guard.state_dict()
    other = jel.ValidationGuard(lambda: 0, lambda kept: None)
    other.start(40, ())
    other.load_state_dict(kept)
    assert (other.first, other.best, other.best_step, other.retreated) == (1.0, 1.0, 0, 1)
    assert other.state_dict() == kept


@pytest.mark.parametrize("retreats", [0, 6])
@pytest.mark.parametrize("told", ["loss", "val_loss"])
def test_a_batch_that_is_not_a_number_costs_a_window_and_not_the_run(told, retreats):
    """The momenta take it up as well: going back to the weights alone would lose them at the next step."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    guard = jel.ValidationGuard.of(model, every=1, retreats=retreats)
    scheduler = jel.Scheduler(optimizer, 60, "lhopt", guard=guard)
    x = torch.randn(60, 16, 4)
    for step in range(60):
        loss = (model(x[step] * (math.nan if step == 30 else 1.0)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.observe(loss=loss if told == "loss" else 1.0, val_loss=(model(x[0]) - 1).square().mean())
        scheduler.step()
    assert loss.isfinite() and loss < 1
    assert (guard.tripped is None, guard.retreated) == ((True, 1) if retreats else (False, 0))
    base = optimizer.param_groups[0]["lr"] == 1e-3 and scheduler.multipliers["0"]["lr"] == 1.0
    assert base == (retreats == 0)


@pytest.mark.parametrize("retreats", [0, 6])
def test_going_back_with_the_optimizers_own_state_brings_no_values_back(retreats):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    save = lambda: copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    load = lambda kept: (model.load_state_dict(kept[0]), optimizer.load_state_dict(kept[1]))
    guard, rates = jel.ValidationGuard(save, load, retreats=retreats), []
    scheduler = jel.Scheduler(optimizer, 40, "lhopt", guard=guard)
    for step in range(30):
        loss = (model(torch.randn(16, 4)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        before = optimizer.param_groups[0]["lr"]
        scheduler.observe(loss=loss, val_loss=math.nan if step == 20 else 1.0 / (step + 1))
        rates.append(optimizer.param_groups[0]["lr"])
        expected = (before / 4 if retreats else 1e-3) if step == 20 else before
        assert rates[-1] == pytest.approx(expected)
        scheduler.step()
    if retreats:
        assert guard.tripped is None and len(set(rates[21:])) > 2
        return
    assert guard.tripped and scheduler.multipliers["0"]["lr"] == 1.0
    assert optimizer.param_groups[0]["lr"] == 1e-3 and optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("shift", [-5.0, math.nan])
def test_a_loss_that_it_never_saw_is_said_once(shift):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = jel.Scheduler(optimizer, 40, "lhopt")
    with pytest.warns(UserWarning, match="not a number above 0") as said:
        for _ in range(40):
            optimizer.step()
            scheduler.observe(loss=shift)
            scheduler.step()
    assert len(said) == 1


def test_only_so_many_copies_are_kept_and_those_of_the_best():
    made = iter("abcdefg")
    guard, loaded = jel.ValidationGuard(lambda: next(made), print, margin=9.0, keep=3, retreats=0), []
    guard.snapshot(lambda: next(made), loaded.append)
    guard.start(10, ())
    for step, loss in enumerate((5.0, 4.0, 6.0, 7.0, 3.0, math.nan)):
        guard.validated(step, loss)
    assert [kept for _, _, kept in guard._kept] == ["d", "b", "a"]  # 7.0 was not copied
    assert guard.tripped and loaded == ["d"]  # what is not finite goes back at once
    guard.validated(6, 2.0)
    assert guard.load_best() == 6 and loaded[-1] == "e"  # the base's run is kept too
    with pytest.raises(JelError, match="at least 1 copy"):
        jel.ValidationGuard(lambda: 0, print, keep=0)
    with pytest.raises(JelError, match="a number of times"):
        jel.ValidationGuard(lambda: 0, print, retreats=-1)
    for numbers in ({"worse": -0.1}, {"cut": 0.0}, {"cut": 1.5}, {"worse": "much"}):
        with pytest.raises(JelError, match="needs worse of 0 or more"):
            jel.ValidationGuard(lambda: 0, print, **numbers)
