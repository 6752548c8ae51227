"""jel.Scheduler in loops that warm up, accumulate, clip, compile and resume; test_scheduler_input.py has refusals."""

from __future__ import annotations

import copy
import gc
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

import jel
from jel.source import steps_of
from tests.loops import Loop, adamw, attached, batch, make_model, sgd, warm_up, warm_up_and_down
from tests.test_controller import Halving

T = 16
OPTIMIZERS = {"adamw": adamw, "sgd": sgd, "tensor rate": partial(adamw, tensor=True)}
MOVING = jel.schedules.piecewise(
    [
        (0.0, {"*": {"lr": 2.0, "weight_decay": 0.5}}),
        (0.3, {"*": {"lr": 3.0}, "1": {"lr": 0.7}}),
        (0.7, {"*": {"lr": 0.4}}),
    ]
)
ONES = jel.schedules.piecewise([(p, {"*": {"lr": 1.0, "weight_decay": 1.0}, "0": {"lr": 1.0}}) for p in (0.0, 0.4)])


# -----------------------------------------------------------------------------
# adopting it


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("make_inner", [None, warm_up, warm_up_and_down])
@pytest.mark.parametrize("how", ["inner", "after", "before"])
def test_multipliers_of_one_leave_the_loop_bit_for_bit_as_it_was(make_optimizer, make_inner, how):
    """Warmed up, accumulated, clipped, compiled, stopped in the middle and resumed in fresh objects."""
    if how == "inner":
        attach = attached(T, ONES)
    else:  # the loop keeps its own scheduler and steps ours beside it
        beside = lambda optimizer, inner: [inner] * (inner is not None) + [jel.Scheduler(optimizer, T, ONES)]
        attach = beside if how == "after" else lambda optimizer, inner: beside(optimizer, inner)[::-1]
    plain = Loop(make_optimizer, make_inner, compiled=True).train(range(T))
    first = Loop(make_optimizer, make_inner, attach, compiled=True).train(range(T // 2))
    second = Loop(make_optimizer, make_inner, attach, compiled=True).load(first.save()).train(range(T // 2, T))
    second.rates = first.rates + second.rates
    assert second.same_as(plain)
    moved = Loop(make_optimizer, make_inner, attached(T, MOVING)).train(range(T))
    assert not moved.same_as(plain)  # the comparison sees a difference


def test_the_guard_and_controllers_leave_it_too():
    plain = Loop(adamw, warm_up).train(range(T))
    for source, options in ((ONES, {"guard": jel.Guard(every=1, measure=0.5)}), (jel.NullController(), {})):
        loop = Loop(adamw, warm_up, attached(T, source, **options))
        for step in range(T):
            loop.schedulers[0].observe(loss=1.0)
            loop.train(range(step, step + 1))
        assert loop.same_as(plain)


# -----------------------------------------------------------------------------
# base x multiplier


class Falling(LRScheduler):
    """A user's own, closed form."""

    def get_lr(self):
        return [base * 0.9**self.last_epoch for base in self.base_lrs]


INNERS = {
    "none": lambda optimizer: None,
    "chainable": warm_up,
    "closed form": lambda o: LambdaLR(o, lambda step: (step + 1) / 20),
    "cosine": lambda o: CosineAnnealingLR(o, T),
    "one cycle": lambda o: OneCycleLR(o, 0.1, T),
    "sequential": warm_up_and_down,
    "own": Falling,
}


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_rates_are_what_the_inner_scheduler_gives_times_what_the_schedule_says(data):
    """Against the inner scheduler alone, and the schedule read off at t / T."""
    total = data.draw(st.integers(1, 40))
    points = sorted(data.draw(st.sets(st.integers(1, 99), max_size=5)))
    values = st.floats(0.2, 2.0)  # within the limit of the change from one to the next
    rows = [(p / 100, {"*": {"lr": data.draw(values)}, "1": {"lr": data.draw(values)}}) for p in [0, *points]]
    name = data.draw(st.sampled_from(sorted(INNERS)))
    tensor = data.draw(st.booleans())
    reference, optimizer = (adamw(make_model(), tensor) for _ in range(2))
    alone, inner = INNERS[name](reference), INNERS[name](optimizer)
    scheduler = jel.Scheduler(optimizer, total, jel.schedules.piecewise(rows), inner)
    for step in range(min(total, T) + 1):
        held = [m for p, m in rows if p <= min(step, total - 1) / total][-1]
        want = [float(g["lr"] * held[key]["lr"]) for g, key in zip(reference.param_groups, ("*", "1"))]
        assert [float(g["lr"]) for g in optimizer.param_groups] == want
        assert [float(rate) for rate in scheduler.get_last_lr()] == want == [float(x) for x in scheduler.get_lr()]
        if step < min(total, T):
            optimizer.step()
            scheduler.step()
            reference.step()
            if alone is not None:
                alone.step()


def test_a_plateau_scheduler_gets_its_metric():
    optimizer = adamw(make_model())
    inner = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    scheduler = jel.Scheduler(optimizer, T, jel.schedules.constant(4.0), inner)
    rates = []
    for loss in (1.0, 2.0, 0.5, 0.6):
        optimizer.step()
        scheduler.step(loss)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.012, 0.006, 0.006, 0.003])


@pytest.mark.parametrize("before", [True, False])
def test_a_chainable_scheduler_beside_it_composes_in_any_order(before):
    reference, optimizer = adamw(make_model()), adamw(make_model())
    alone = warm_up(reference)
    first = warm_up(optimizer) if before else None
    scheduler = jel.Scheduler(optimizer, T, MOVING)
    assert scheduler.base_lrs == [3e-3, 3e-3]  # initial_lr, whatever the warm-up has done to it
    beside = first or warm_up(optimizer)
    assert beside.base_lrs == [3e-3, 3e-3]
    for _ in range(T):
        factor = [own["lr"] for own in scheduler.multipliers.values()]
        for group, base, m in zip(optimizer.param_groups, reference.param_groups, factor):
            assert group["lr"] == pytest.approx(base["lr"] * m)
        for stepped in (reference, alone, optimizer, *((beside, scheduler) if before else (scheduler, beside))):
            stepped.step()


def test_within_sequential_lr_it_begins_at_the_milestone():
    optimizer = sgd(make_model())
    schedule = jel.schedules.piecewise([(0.0, {"*": {"lr": 2.0}}), (0.5, {"*": {"lr": 0.5}})])
    scheduler = SequentialLR(optimizer, [warm_up(optimizer), jel.Scheduler(optimizer, 6, schedule)], [4])
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:4] == pytest.approx([0.05 * f for f in (0.1, 0.325, 0.55, 0.775)])
    assert rates[4:] == pytest.approx([0.1] * 3 + [0.025] * 3)


def test_decision_points_fall_on_the_first_step_at_or_above_them():
    for total in (1, 7, 10, 561, 3000):
        points = [0.0, 0.1, 0.3, 0.7, 50 / 561]
        assert steps_of(sorted(points), total) == sorted(
            {t for p in points for t in [next((s for s in range(total) if s / total >= p), total)] if t < total}
        )


# -----------------------------------------------------------------------------
# other hyperparameters


def test_decay_and_betas_are_set_and_return():
    rows = [(0.0, {"*": {"weight_decay": 0.5, "beta1": 0.5}, "1": {"1-beta2": 10.0}}), (0.5, {"*": {"momentum": 1.1}})]
    optimizer = adamw(make_model())
    scheduler = jel.Scheduler(optimizer, 4, jel.schedules.piecewise(rows))
    a, b = optimizer.param_groups
    assert (a["weight_decay"], a["betas"], b["weight_decay"]) == (0.05, (0.45, 0.999), 0.0)
    assert b["betas"] == pytest.approx((0.45, 0.99)) and scheduler.multipliers["1"]["1-beta2"] == 10.0
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    assert a["betas"] == pytest.approx((0.99, 0.999)) and a["weight_decay"] == 0.1
    assert b["betas"][1] == pytest.approx(0.999)
    scheduler.release()
    assert [g["betas"] for g in optimizer.param_groups] == [(0.9, 0.999)] * 2 and a["lr"] == 3e-3


def test_a_momentum_stays_below_one():
    for optimizer in (sgd(make_model()), adamw(make_model())):
        jel.Scheduler(optimizer, 4, jel.schedules.constant(5.0, "momentum"))
        group = optimizer.param_groups[0]
        assert group.get("momentum", group.get("betas", (0,))[0]) == 0.9999


# -----------------------------------------------------------------------------
# counting, compiling


@pytest.mark.parametrize("extra", [0, 1, 3])
def test_it_counts_optimizer_steps_however_often_it_is_called(extra):
    """Called at every micro-batch, as loops that accumulate do, or several times, as Accelerate does."""
    model = make_model()
    optimizer = sgd(model)
    scheduler = jel.Scheduler(optimizer, T, MOVING)
    for step in range(T):
        want = jel.ScheduleController(MOVING).decide({"progress": step / T})["*"]["lr"]
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * want) and scheduler.last_epoch == step
        for _ in range(extra):
            scheduler.step()
        optimizer.step()
        for _ in range(1 + extra):
            scheduler.step()


def test_guard_and_inner_count_optimizer_steps_too():
    """Four calls a step, as one: the same rates, and as many bad comparisons until the guard trips."""

    def trained(calls):
        optimizer = sgd(make_model())
        inner = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, T)
        guard = jel.Guard(curve=[(0, 1.0), (T, 1.0)], smooth=0.0, every=1, patience=T - 2)
        scheduler = jel.Scheduler(optimizer, T, jel.schedules.constant(2.0), inner=inner, mode="shape", guard=guard)
        rates, tripped = [], []
        for _ in range(T):
            optimizer.step()
            scheduler.observe(loss=9.0)
            for _ in range(calls):
                scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
            tripped.append(guard.tripped is not None)
        return rates, tripped

    once, often = trained(1), trained(4)
    assert once == often and once[1].index(True) == T - 3


def test_it_says_when_a_decision_is_due():
    optimizer = sgd(make_model())
    halves = jel.schedules.piecewise([(0.0, {"*": {"lr": 1.0}}), (0.5, {"*": {"lr": 2.0}})])
    scheduler = jel.Scheduler(optimizer, T, halves)
    due = []
    for _ in range(T):
        assert not scheduler.decision_due  # before the optimizer's step nothing is
        optimizer.step()
        due.append(scheduler.decision_due)
        scheduler.step()
    assert [step + 1 for step in range(T) if due[step]] == [T // 2]
    with pytest.raises(jel.JelError, match="tell a loss to observe"):
        scheduler.step(0.7)


@pytest.mark.parametrize(
    "told, message",
    [
        ({"loss": torch.zeros(3)}, "train_loss a tensor of 3 elements; it takes one number"),
        ({"val_loss": None}, "val_loss None"),
        ({"loss": "a"}, "train_loss 'a'"),
    ],
)
def test_what_is_told_must_be_a_number(told, message):
    scheduler = jel.Scheduler(sgd(make_model()), T, jel.schedules.constant(2.0))
    with pytest.raises(jel.JelError, match=message):
        scheduler.observe(**told)


def test_a_guard_is_a_guard_and_resumes_under_its_like():
    with pytest.raises(jel.JelError, match="guard is <class"):
        jel.Scheduler(sgd(make_model()), T, jel.schedules.constant(2.0), guard=jel.ValidationGuard)
    model = make_model()
    guards = [None, jel.Guard(curve=[(0, 1.0)]), jel.ValidationGuard.of(model)]
    make = lambda guard: jel.Scheduler(sgd(model), T, jel.schedules.constant(2.0), guard=guard or False)
    states = [make(guard).state_dict() for guard in guards]
    for i, state in enumerate(states):
        for k, guard in enumerate(guards):
            scheduler = make(guard)
            before = scheduler.state_dict()
            if i == k:
                scheduler.load_state_dict(state)
                continue
            with pytest.raises(jel.JelError, match="guard"):
                scheduler.load_state_dict(state)
            assert scheduler.state_dict() == before


def test_a_wrapped_optimizer_is_unwrapped():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self):
            self.optimizer.step()

    inner = sgd(make_model())
    wrapper = Wrapper(inner)
    scheduler = jel.Scheduler(wrapper, T, jel.schedules.constant(2.0))
    wrapper.step()
    scheduler.step()
    assert inner.param_groups[0]["lr"] == 0.1 and scheduler.last_epoch == 1


def test_calls_are_counted_where_optimizer_steps_cannot_be():
    optimizer = sgd(make_model())
    scheduler = jel.Scheduler(optimizer, 200, MOVING, count="calls")
    for _ in range(100):
        scheduler.step()
    assert scheduler.last_epoch == 100 and optimizer.param_groups[0]["lr"] == pytest.approx(0.15)
    scheduler.release()
    silent = jel.Scheduler(optimizer, 200, MOVING)
    with pytest.warns(UserWarning, match="no optimizer step seen"):
        for _ in range(100):
            silent.step()


def test_nothing_is_compiled_again_when_rates_change():
    """The model under a float rate; the optimizer's step too under a tensor rate."""
    moving = jel.schedules.piecewise([(i / T, {"*": {"lr": 1 + i / T}}) for i in range(T)])
    for compile_step, tensor in ((False, False), (True, True)):
        torch._dynamo.reset()
        counter, model = CompileCounter(), make_model()
        optimizer = adamw(model, tensor)
        scheduler = jel.Scheduler(optimizer, T, moving)
        forward = torch.compile(model, backend=counter)
        step = optimizer.step
        if compile_step:
            step = torch.compile(lambda: optimizer.step(), backend=counter)  # noqa: B023
        counts = []
        for t in range(T):
            forward(batch(t, 0)[0]).square().mean().backward()
            step()
            scheduler.step()
            optimizer.zero_grad()
            counts.append(counter.frame_count)
        assert counts[1:] == [counts[1]] * (T - 1) and counts[-1] > 0
        assert scheduler.last_epoch == T
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(3e-3 * (2 - 1 / T))


def test_tensors_are_filled_and_never_replaced():
    optimizer = adamw(make_model(), tensor=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler = jel.Scheduler(optimizer, T, MOVING, warm_up(optimizer))
    for _ in range(T):
        optimizer.step()
        scheduler.step()
        assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates))
    assert float(rates[0]) == pytest.approx(3e-3 * 0.4)


# -----------------------------------------------------------------------------
# resuming


@pytest.mark.parametrize("at", [0, 1, 5, 11, T])
@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_resumed_run_is_the_run(make_optimizer, at):
    whole = Loop(make_optimizer, warm_up_and_down, attached(T, MOVING)).train(range(T))
    first = Loop(make_optimizer, warm_up_and_down, attached(T, MOVING)).train(range(at))
    second = Loop(make_optimizer, warm_up_and_down, attached(T, MOVING)).load(first.save())
    assert [g["weight_decay"] for g in second.optimizer.param_groups] == [
        g["weight_decay"] for g in first.optimizer.param_groups
    ]
    second.train(range(at, T))
    second.rates = first.rates + second.rates
    assert second.same_as(whole)
    assert second.schedulers[0].state_dict() == whole.schedulers[0].state_dict()


def test_a_scheduler_made_after_the_optimizer_was_loaded_knows_the_base():
    """Its contract is checked, and its base values are read, in groups that hold products."""
    schedule = jel.make_schedule(MOVING["decisions"], "test", jel.Contract.of(sgd(make_model()), T))
    first = Loop(sgd, None, attached(T, schedule)).train(range(6))
    optimizer = sgd(make_model())
    optimizer.load_state_dict(first.optimizer.state_dict())
    resumed = jel.Scheduler(optimizer, T, schedule)
    resumed.load_state_dict(first.schedulers[0].state_dict())
    assert resumed.state_dict() == first.schedulers[0].state_dict()
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in first.optimizer.param_groups]


def test_a_controller_with_feedback_resumes():
    class Watching(Halving):
        observes = frozenset({"train_loss", "step"})

        def decide(self, observation):
            if observation["train_loss"] > self.last:
                self.factor /= 2
            if observation["step"]:  # nothing is measured before the first step
                self.last = observation["train_loss"]
            return {"*": {"lr": self.factor}}

    def run(losses, scheduler, optimizer):
        rates = []
        for loss in losses:
            scheduler.observe(loss=torch.tensor(loss))
            optimizer.step()
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    losses = [4.0, 4.2, 4.1, 5.0, 3.0, 3.5, 3.6, 1.0]
    make = lambda o: jel.Scheduler(o, 8, Watching(), interval=2)
    straight = sgd(make_model())
    want = run(losses, make(straight), straight)
    assert len(set(want)) > 2
    one, two = sgd(make_model()), sgd(make_model())
    first = make(one)
    begun = run(losses[:3], first, one)
    second = make(two)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert begun + run(losses[3:], second, two) == want


def test_a_first_decision_may_wait_for_what_it_observes():
    class Probing(jel.Controller):
        observes = frozenset({"probe_loss"})

        def decide(self, observation):
            return {"*": {"lr": observation["probe_loss"]}}

    optimizer = sgd(make_model())
    scheduler = jel.Scheduler(optimizer, 8, Probing())
    assert optimizer.param_groups[0]["lr"] == 0.05
    scheduler.observe(probe_loss=2.0)
    assert optimizer.param_groups[0]["lr"] == 0.1
    waiting = jel.Scheduler(other := sgd(make_model()), 8, Probing())
    other.step()
    with pytest.raises(jel.JelError, match=r"call observe\(probe_loss=...\) before step\(\)"):
        waiting.step()


def test_neither_keeps_the_other_alive():
    optimizer = sgd(make_model())
    jel.Scheduler(optimizer, T, MOVING)
    gc.collect()
    jel.Scheduler(optimizer, T, MOVING)  # the first is gone, so there are no two
    assert optimizer.param_groups[0]["lr"] <= 0.05 * 2


def test_it_is_a_torch_scheduler():
    optimizer = sgd(make_model())
    scheduler = jel.Scheduler(optimizer, T, jel.schedules.constant(1.0), LinearLR(optimizer))
    assert isinstance(scheduler, LRScheduler) and scheduler.optimizer is optimizer and scheduler.last_epoch == 0
