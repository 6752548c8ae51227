"""`jel.Scheduler` beside what else happens in a loop: other schedulers, roll-backs, closures, copies, rare calls."""

import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, OneCycleLR, ReduceLROnPlateau, SequentialLR

import jel
from jel.schedules import constant, piecewise

RISE = piecewise([(0.0, 2.0), (0.5, 0.5)])


def sgd(lr=1.0, **options):
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.zeros(3)
    return SGD([parameter], lr=lr, **options)


def rate(optimizer):
    return float(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("told", ["guard", "waiting", "nothing"])
def test_observe_keeps_the_factor_of_a_scheduler_beside(told):
    class Waiting(jel.Controller):
        observes = frozenset({"probe_loss"})

        def decide(self, observation):
            return {"*": {"lr": 0.5}}

    optimizer = sgd()
    given = Waiting() if told == "waiting" else constant(0.5)
    guard = jel.ValidationGuard(save=lambda: None, load=lambda _: None) if told == "guard" else False
    scheduler = jel.Scheduler(optimizer, 50, given, guard=guard)
    beside = ExponentialLR(optimizer, 0.9)
    for n in range(1, 6):
        if n == 2:
            scheduler.observe(probe_loss=1.0)
        optimizer.step()
        if told != "waiting" or n > 1:
            scheduler.step()
        beside.step()
        if told == "guard":
            scheduler.observe(val_loss=1.0)
        assert rate(optimizer) == pytest.approx((0.5 if told != "waiting" or n > 1 else 1) * 0.9**n)
    scheduler.release()
    assert rate(optimizer) == pytest.approx(0.9**5)


@pytest.mark.parametrize("first", [2.0, 1.0])
def test_an_optimizer_rolled_back_alone_has_the_present_multiplier(first):
    optimizer = sgd()
    scheduler = jel.Scheduler(optimizer, 10, piecewise([(0.0, first), (0.5, 0.5)]))
    for step in range(8):
        if step == 2:
            saved = copy.deepcopy(optimizer.state_dict())
        if step == 6:
            optimizer.load_state_dict(saved)
            assert rate(optimizer) == 0.5
        optimizer.step()
        scheduler.step()
    assert rate(optimizer) == 0.5


@pytest.mark.parametrize("make", [jel.Guard, lambda **k: jel.ValidationGuard(lambda: None, lambda _: None, **k)])
@pytest.mark.parametrize("calls", [2, 3, 7])
def test_a_guard_looks_however_rarely_step_is_called(make, calls):
    options = {"curve": [(0, 1.0), (100, 1.0)]} if make is jel.Guard else {}
    optimizer = sgd()
    guard = make(every=10, **options)
    scheduler = jel.Scheduler(optimizer, 100, constant(2.0), guard=guard)
    for step in range(1, 41):
        optimizer.step()
        scheduler.observe(loss=math.nan)
        if step % calls == 1:
            scheduler.step()
    assert guard.tripped and rate(optimizer) == 1.0


def test_what_inner_gives_beside_the_rate_is_multiplied_too():
    plain, ours = (AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.1) for _ in range(2))
    alone = OneCycleLR(plain, 0.1, total_steps=20)
    inner = OneCycleLR(ours, 0.1, total_steps=20)
    scheduler = jel.Scheduler(ours, 20, constant(2.0, "1-beta1"), inner)
    for _ in range(19):
        beta = plain.param_groups[0]["betas"][0]
        assert 1 - ours.param_groups[0]["betas"][0] == pytest.approx(2 * (1 - beta))
        for optimizer, one in ((plain, alone), (ours, scheduler)):
            optimizer.step()
            one.step()


def test_a_plateau_is_stepped_with_a_metric_only():
    optimizer = sgd()
    inner = ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    scheduler = jel.Scheduler(optimizer, 40, constant(2.0), inner)
    for step in range(20):
        optimizer.step()
        scheduler.step()
        if step % 5 == 4:
            scheduler.step(metrics=1.0)
    assert inner.last_epoch == 4 and rate(optimizer) == pytest.approx(2 * 0.1**3)
    with pytest.raises(jel.JelError, match="no inner scheduler"):
        jel.Scheduler(sgd(), 40, constant(2.0)).step(metrics=1.0)


@pytest.mark.parametrize("through", [copy.deepcopy, copy.copy, pickle.dumps])
def test_a_copy_is_refused_in_one_line(through):
    with pytest.raises(jel.JelError, match="make one anew"):
        through(jel.Scheduler(sgd(), 10, RISE))


def test_a_checkpoint_within_a_warm_up_goes_on_as_the_run():
    def run():
        optimizer = sgd()
        ours = jel.Scheduler(optimizer, 20, piecewise([(0.0, 0.5), (0.3, 2.0)]))
        return optimizer, SequentialLR(optimizer, [ConstantLR(optimizer, 0.1, 5), ours], [5])

    (optimizer, whole), (other, resumed) = run(), run()
    rates = []
    for step in range(15):
        if step == 3:
            states = copy.deepcopy((optimizer.state_dict(), whole.state_dict()))
        rates.append(rate(optimizer))
        optimizer.step()
        whole.step()
    other.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    for step in range(3, 15):
        assert rate(other) == rates[step], step
        other.step()
        resumed.step()
    assert rates[2] == 0.1 and rates[6] == 0.5 and rates[14] == 2.0


def test_a_rate_of_0_left_by_a_schedule_that_ended_is_refused():
    optimizer = sgd()
    ended = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    for _ in range(5):
        optimizer.step()
        ended.step()
    with pytest.raises(jel.JelError, match="is 0"):
        jel.Scheduler(optimizer, 10, constant(2.0))


def test_bounds_by_name_leave_other_multipliers_checked():
    with pytest.raises(jel.JelError, match="outside of the bounds"):
        jel.Scheduler(sgd(), 10, constant(500.0), bounds={"weight_decay": (0.1, 10)})
    optimizer = sgd()
    jel.Scheduler(optimizer, 10, constant(500.0), bounds={"lr": (0.1, 10)})
    assert rate(optimizer) == 10


@pytest.mark.parametrize("two", [np.float32(2), np.float64(2), np.int64(2), Fraction(2)])
def test_numbers_of_any_kind_become_pythons_own(two, tmp_path):
    scheduler = jel.Scheduler(sgd(), 10, piecewise([(0.0, two), (two / 4, 1.0)]))
    torch.save(scheduler.state_dict(), tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=True)
    by_hand = {**constant(1.0), "decisions": [{"progress": 0, "multipliers": {"*": {"lr": two}}}]}
    assert type(jel.Scheduler(sgd(), 10, by_hand).state_dict()["controller"]["decisions"][0]["progress"]) is float


@pytest.mark.parametrize("rows", [[0.5, 0.2], [(0.0, 1.0, 2.0)], [None]])
def test_rows_that_are_no_pairs_are_refused(rows):
    with pytest.raises(jel.JelError, match="rows"):
        piecewise(rows)


def test_losses_in_half_precision_are_summed_in_full():
    observer = jel.Observer(sgd())
    for _ in range(2000):
        observer.observe(loss=torch.tensor(2.0, dtype=torch.bfloat16))
    assert float(observer.mean_loss) == 2.0


@pytest.mark.parametrize("by_name", [True, False])
def test_a_step_with_a_closure_is_measured_like_one_without(by_name):
    def run(closure):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        optimizer = AdamW(model.parameters(), lr=0.01)
        scheduler = jel.Scheduler(optimizer, 40, "lhopt")
        for step in range(20):

            def backward(step=step):
                optimizer.zero_grad()
                loss = (model(torch.full((3, 4), float(step % 3))) - 1).square().mean()
                loss.backward()
                scheduler.observe(loss=loss)
                return loss

            if closure:
                optimizer.step(closure=backward) if by_name else optimizer.step(backward)
            else:
                backward()
                optimizer.step()
            scheduler.step()
        return [p.detach() for p in model.parameters()], scheduler.multipliers

    (weights, multipliers), (others, theirs) = run(True), run(False)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    assert multipliers == theirs


@pytest.mark.parametrize("total", [7, 29, 30, 100, 250])
def test_a_controller_decides_as_often_as_it_wants(total):
    steps = []

    class Counting(jel.Controller):
        decisions = 20
        observes = frozenset({"step"})

        def decide(self, observation):
            steps.append(observation["step"])
            return {}

    optimizer = sgd()
    scheduler = jel.Scheduler(optimizer, total, Counting())
    for _ in range(total):
        optimizer.step()
        scheduler.step()
    assert len(steps) == len(set(steps)) == min(total, 20)


def test_a_scheduler_that_is_gone_no_longer_watches():
    optimizer = sgd()
    for _ in range(3):
        scheduler = jel.Scheduler(optimizer, 40, "lhopt")
        del scheduler
    assert not optimizer._optimizer_step_pre_hooks


def test_a_controller_that_goes_on_with_another_optimizer_watches_that_one():
    controller, scheduler = jel.LhoptController(), None
    for _ in range(2):  # the second scheduler is made before the first is gone
        optimizer = sgd(lr=0.01)
        scheduler = jel.Scheduler(optimizer, 40, controller)
    for _ in range(4):
        optimizer.step()
        scheduler.observe(loss=1.0)
        scheduler.step()
    assert len(optimizer._optimizer_step_pre_hooks) == 1 and controller.observer is not None


def test_releasing_twice_frees_nobody_elses_optimizer():
    optimizer = sgd()
    first = jel.Scheduler(optimizer, 10, RISE)
    first.release()
    second = jel.Scheduler(optimizer, 10, RISE)
    first.release()
    with pytest.raises(jel.JelError, match="already has"):
        jel.Scheduler(optimizer, 10, RISE)
    assert rate(optimizer) == 2.0 and second.multipliers


def test_a_released_optimizer_keeps_nothing_of_ours():
    optimizer = sgd(weight_decay=0.2)
    jel.Scheduler(optimizer, 10, constant(2.0, "weight_decay")).release()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    jel.Scheduler(optimizer, 10, constant(2.0, "weight_decay"))
    assert optimizer.param_groups[0]["weight_decay"] == 0.0


def test_states_and_groups_that_do_not_fit_are_refused():
    def named(*names):
        return SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "name": name} for name in names], lr=1.0)

    with pytest.raises(jel.JelError, match="share a name"):
        jel.Scheduler(named("a", "a"), 10, RISE)
    state = jel.Scheduler(named("body", "head"), 10, RISE).state_dict()
    with pytest.raises(jel.JelError, match="head, body"):
        jel.Scheduler(named("head", "body"), 10, RISE).load_state_dict(state)
    for broken in ({"dampness": 1.0}, {"lr": math.nan}):
        optimizer = named("body", "head")
        scheduler = jel.Scheduler(optimizer, 10, RISE)
        with pytest.raises(jel.JelError, match="malformed"):
            scheduler.load_state_dict({**state, "multipliers": [broken, broken]})
        assert rate(optimizer) == 2.0
    scheduler = jel.Scheduler(sgd(), 10, RISE)
    for step in (-1, 11):
        with pytest.raises(jel.JelError, match="outside"):
            scheduler.step(step)
    with pytest.raises(jel.JelError, match="decision points of its own"):
        jel.Scheduler(sgd(), 10, RISE, interval=2)
    with pytest.raises(jel.JelError, match="not finite"):
        jel.Scheduler(sgd(), 10, RISE, guard=jel.Guard(curve=[(0, math.nan), (10, 1.0)]))
