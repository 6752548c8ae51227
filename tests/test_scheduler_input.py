"""What jel.Scheduler refuses: one clear line, and the optimizer as it was."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, LinearLR

import jel
from jel import Contract, Decision, GroupContract, JelError
from jel.decisions import bounded
from jel.schedule import shape_of
from tests.jel_parts import FEEDBACK, lively_policy
from tests.loops import adamw, make_model, sgd

T = 100
TWICE = jel.schedules.constant(2.0)


def learned(contract: Contract | None, rows=((0.0, 4.0), (0.5, 40.0))) -> dict:
    return jel.make_schedule([{"progress": p, "multipliers": {"*": {"lr": m}}} for p, m in rows], "test", contract)


def groups_and_hooks(optimizer) -> tuple:
    groups = [{k: copy.deepcopy(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return groups, len(optimizer._optimizer_step_post_hooks), "step" in vars(optimizer)


class Saying(jel.Controller):
    """Says what it is given."""

    observes = frozenset({"progress"})

    def __init__(self, decided):
        self.decided = decided

    def decide(self, observation):
        return self.decided


class Probing(jel.Controller):
    observes = frozenset({"probe_loss"})


class Unknowing:
    observes = frozenset({"weather"})
    decide = state_dict = load_state_dict = print


CONTRACT = Contract.of(adamw(make_model()), T)
REFUSED = {
    "no optimizer": (lambda o: (make_model(), T, TWICE), {}, "is no torch optimizer"),
    "no length": (lambda o: (o, 0, TWICE), {}, "number of optimizer steps"),
    "a length in halves": (lambda o: (o, 1.5, TWICE), {}, "number of optimizer steps"),
    "no schedule": (lambda o: (o, T, None), {}, "has no method decide"),
    "a name of nothing": (lambda o: (o, T, "adam"), {}, "adam is no schedule"),
    "a missing file": (lambda o: (o, T, "/nowhere/s.json"), {}, "does not exist"),
    "no format": (lambda o: (o, T, {"decisions": []}), {}, "not a jel-schedule"),
    "a mode": (lambda o: (o, T, TWICE), {"mode": "relative"}, "one of absolute, shape"),
    "bounds": (lambda o: (o, T, TWICE), {"bounds": (2.0, 1.0)}, "bounds are"),
    "bounds by name": (lambda o: (o, T, TWICE), {"bounds": {"lr": 3}}, "bounds are"),
    "a limit below 1": (lambda o: (o, T, TWICE), {"max_change": 0.5}, "factor above 1"),
    "an interval": (lambda o: (o, T, TWICE), {"interval": 0}, "number of optimizer steps"),
    "a count": (lambda o: (o, T, TWICE), {"count": "epochs"}, "'optimizer' or 'calls'"),
    "an unknown group": (lambda o: (o, T, jel.schedules.constant(2.0, group="head")), {}, "unknown group head"),
    "an unknown hyperparameter": (lambda o: (o, T, jel.schedules.constant(2.0, "rho")), {}, "sets rho, which no"),
    "one of a group": (lambda o: (o, T, jel.schedules.constant(2.0, "rho", "1")), {}, "sets rho of group 1"),
    "two names of one": (
        lambda o: (o, T, jel.schedules.piecewise([(0.0, {"*": {"beta1": 0.9, "momentum": 0.9}})])),
        {},
        "under two names",
    ),
    "beyond the bounds": (lambda o: (o, T, jel.schedules.constant(1000.0)), {}, "outside of the bounds 0.01..100"),
    "an unknown contract": (lambda o: (o, T, learned(None)), {}, "does not say what it was learned against"),
    "the shipped policy": (lambda o: (o, T, "jel"), {}, "does not say what it was learned against|does not fit"),
    "another kind": (lambda o: (sgd(make_model()), T, learned(CONTRACT)), {}, "learned on adamw, and group 0 is"),
    "another length": (
        lambda o: (o, 10 * T, learned(CONTRACT)),
        {},
        "meant for 25 to 400 steps, and this run has 1000",
    ),
    "another base schedule": (
        lambda o: (o, T, learned(CONTRACT), LinearLR(o)),
        {},
        "base schedule constant, and here it is LinearLR",
    ),
    "someone else's inner": (lambda o: (o, T, TWICE, LinearLR(sgd(make_model()))), {}, "another optimizer"),
    "a controller that observes nothing known": (lambda o: (o, T, Unknowing()), {}, "observes unknown"),
    "feedback as a shape": (
        lambda o: (o, T, jel.PolicyController(lively_policy(features=FEEDBACK))),
        {"mode": "shape"},
        "needs a schedule",
    ),
    "multipliers of NaN": (lambda o: (o, T, Saying({"*": {"lr": math.nan}})), {}, "finite number above 0"),
    "multipliers of nothing": (lambda o: (o, T, Saying(None)), {}, "must map"),
    "a return without a snapshot": (lambda o: (o, T, Saying(Decision({}, go_back=5))), {}, "no guard"),
    "a guard without room": (lambda o: (o, 70, TWICE), {"guard": True}, "would measure the base over 7 steps"),
}


@pytest.mark.parametrize("make, options, message", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_one_line_and_leaves_the_optimizer_as_it_was(make, options, message):
    optimizer = adamw(make_model())
    arguments = make(optimizer)
    before = groups_and_hooks(optimizer)
    with pytest.raises(JelError, match=message) as e:
        jel.Scheduler(*arguments, **options)
    assert "\n" not in str(e.value)
    assert groups_and_hooks(optimizer) == before
    jel.Scheduler(optimizer, T, TWICE)  # and nothing hinders another


def test_there_is_no_default():
    with pytest.raises(TypeError, match="schedule_or_controller"):
        jel.Scheduler(adamw(make_model()), T)


# -----------------------------------------------------------------------------
# contracts


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lr": 0.3}, "learned at lr 0.003, and group 0 has 0.3"),
        ({"weight_decay": 0.2}, "learned at weight_decay 0.1, and group 0 has 0.2"),
        ({"betas": (0.8, 0.999)}, "learned at beta1 0.9, and group 0 has 0.8"),
        ({"name": "head"}, "learned with param groups 0, 1, and this one is head"),
        ({"kind": "muon"}, "learned on adamw, and group 0 is trained by muon"),
    ],
)
def test_a_schedule_of_another_contract_is_refused_and_its_shape_is_not(change, message):
    optimizer = adamw(make_model())
    optimizer.param_groups[0].update(change)
    with pytest.raises(JelError, match=message):
        jel.Scheduler(optimizer, T, learned(CONTRACT))
    rate = optimizer.param_groups[0]["lr"]
    jel.Scheduler(optimizer, T, learned(CONTRACT), mode="shape")
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * rate)  # 4 of at most 40


def test_a_contract_that_fits_is_applied_and_a_warm_up_does_not_hide_the_base():
    plain = adamw(make_model())
    jel.Scheduler(plain, T, learned(CONTRACT))
    assert plain.param_groups[0]["lr"] == pytest.approx(4 * 3e-3)
    warmed = adamw(make_model())
    scheduler = jel.Scheduler(warmed, T, learned(CONTRACT), LinearLR(warmed, 0.5), base_schedule="constant")
    assert scheduler.get_last_lr()[0] == pytest.approx(4 * 0.5 * 3e-3)


def test_a_contract_survives_json_and_joins_groups_alike():
    assert [g.name for g in CONTRACT.groups] == ["0", "1"]
    assert Contract.from_json(json.loads(json.dumps(CONTRACT.to_json()))) == CONTRACT
    one = torch.optim.AdamW([{"params": [p]} for p in make_model().parameters()], lr=1e-3)
    assert Contract.of(one, T).groups == (
        GroupContract("*", "adamw", {"lr": 1e-3, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999}),
    )
    assert Contract.of(one, T).misfit(one, T, "constant") is None
    for record in (
        3,
        {},
        {"groups": [1]},
        {"groups": [], "steps": 0},
        {"groups": [{"name": "a", "kind": "b", "base": 1}]},
    ):
        with pytest.raises(JelError, match="contract is malformed"):
            Contract.from_json(record)


# -----------------------------------------------------------------------------
# shapes, bounds, limits


def test_a_shape_keeps_each_groups_rate_as_its_peak():
    rows = [
        {"progress": 0.0, "multipliers": {"*": {"lr": 20.0, "weight_decay": 0.5}, "head": {"lr": 3.0}}},
        {"progress": 0.5, "multipliers": {"*": {"lr": 40.0, "weight_decay": 0.1}, "0": {"lr": 10.0}}},
    ]
    schedule = jel.make_schedule(rows, "test")
    shape = shape_of(schedule)
    peaks: dict = {}
    for row in shape["decisions"]:
        for group, own in row["multipliers"].items():
            for key, value in own.items():
                peaks[group, key] = max(value, peaks.get((group, key), 0))
    assert set(peaks.values()) == {1.0} and ("head", "lr") in peaks
    optimizer = adamw(make_model())
    scheduler = jel.Scheduler(optimizer, 2, schedule, mode="shape")  # it has no group "head"
    assert scheduler.multipliers["0"] == {"lr": 1.0, "weight_decay": 1.0}
    assert scheduler.multipliers["1"] == {"lr": 0.5, "weight_decay": 1.0}


def test_bounds_cut_and_may_be_wider():
    for bounds, want in (((0.5, 1.5), 1.5), ({"lr": (0.01, 3.0)}, 3.0), ((0.01, 1e4), 1000.0)):
        scheduler = jel.Scheduler(adamw(make_model()), T, jel.schedules.constant(1000.0), bounds=bounds)
        assert scheduler.multipliers["0"]["lr"] == want


def test_a_decision_moves_by_a_limited_factor():
    rows = [(0.0, {"*": {"lr": 50.0}}), (0.25, {"*": {"lr": 0.02}}), (0.5, {"1": {"lr": 90.0}})]
    optimizer = sgd(make_model())
    scheduler = jel.Scheduler(optimizer, 4, jel.schedules.piecewise(rows), max_change=4.0)
    seen = []
    for _ in range(3):
        seen.append([own["lr"] for own in scheduler.multipliers.values()])
        optimizer.step()
        scheduler.step()
    assert seen == [[50.0, 50.0], [12.5, 12.5], [3.125, 50.0]]
    assert bounded([{}], [{"lr": 2.0}], ["a"], ()) == [{"lr": 1.0}]  # what is no longer set returns


def test_a_schedule_moves_by_any_factor_and_a_controller_by_ten():
    rows = [{"*": {"lr": 0.01}}, {"*": {"lr": 1.0}}]

    class Jumps(jel.Controller):
        def decide(self, observation):
            return rows[int(observation["progress"] >= 0.5)]

    for controller, want in ((jel.schedules.piecewise([(0.0, rows[0]), (0.5, rows[1])]), 1.0), (Jumps(), 0.1)):
        optimizer = sgd(make_model())
        scheduler = jel.Scheduler(optimizer, 2, controller)
        optimizer.step()
        scheduler.step()
        assert scheduler.multipliers["0"]["lr"] == pytest.approx(want)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: jel.Scheduler(adamw(make_model()), T, jel.Controller), "is a class; give an object"),
        (lambda: jel.Guard(margin="a"), "are numbers"),
        (lambda: jel.Guard(curve=[(1, 2, 3)]), "a list of \\(step, loss\\)"),
        (lambda: jel.ValidationGuard.of(None), "takes a torch.nn.Module, not NoneType"),
        (lambda: jel.ValidationGuard.of(make_model(), keep=1.5), "not 1.5"),
    ],
)
def test_parts_refuse_what_they_are_not_for(make, message):
    with pytest.raises(JelError, match=message) as e:
        make()
    assert "\n" not in str(e.value)


def test_bounds_must_have_names_that_hold():
    with pytest.raises(jel.JelError, match="bounds= has lrr, which no param group"):
        jel.Scheduler(adamw(make_model()), T, TWICE, bounds={"lrr": (0.5, 2.0)})
    with pytest.raises(jel.JelError, match="bounds= has beta1, which is set as 1-beta1"):
        jel.Scheduler(adamw(make_model()), T, "lhopt", bounds={"beta1": (0.9, 1.1)})
    scheduler = jel.Scheduler(adamw(make_model()), T, "lhopt", bounds={"1-beta1": (0.99, 1.01)})
    assert 0.99 <= scheduler.multipliers["0"]["1-beta1"] <= 1.01


# -----------------------------------------------------------------------------
# while it trains


def stepped(scheduler, optimizer, times: int) -> None:
    for _ in range(times):
        optimizer.step()
        scheduler.step()


def refuses(act, optimizer, message: str) -> None:
    before = groups_and_hooks(optimizer)
    with pytest.raises(JelError, match=message) as e:
        act()
    assert "\n" not in str(e.value) and groups_and_hooks(optimizer) == before


def test_past_the_end():
    optimizer = sgd(make_model())
    scheduler = jel.Scheduler(optimizer, 3, TWICE, LinearLR(optimizer))
    stepped(scheduler, optimizer, 3)
    optimizer.step()
    refuses(scheduler.step, optimizer, "step 4 is past total_steps, 3")


def test_two_schedulers_on_one_optimizer():
    optimizer = sgd(make_model())
    first = jel.Scheduler(optimizer, T, TWICE)
    refuses(lambda: jel.Scheduler(optimizer, T, TWICE), optimizer, "already has a jel.Scheduler")
    refuses(lambda: jel.Scheduler(optimizer, T, TWICE, first), optimizer, "already has a jel.Scheduler")
    first.release()
    assert jel.Scheduler(optimizer, T, TWICE).get_last_lr() == [0.1, 0.1]


def test_a_scheduler_beside_it_that_sets_rates_outright():
    optimizer = sgd(make_model())
    beside = LambdaLR(optimizer, lambda step: 1.0)
    scheduler = jel.Scheduler(optimizer, T, TWICE)
    optimizer.step()
    beside.step()
    refuses(scheduler.step, optimizer, "give it as inner=")
    optimizer = sgd(make_model())
    LambdaLR(optimizer, lambda step: step / T)
    refuses(lambda: jel.Scheduler(optimizer, T, TWICE), optimizer, "is 0, .* give what set it as inner=")


def test_groups_that_change():
    optimizer = sgd(make_model())
    scheduler = jel.Scheduler(optimizer, T, TWICE)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    optimizer.step()
    refuses(scheduler.step, optimizer, "param groups have changed, from 2 to 3")


def test_groups_that_share_a_tensor():
    rate = torch.tensor(0.1)
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": [a]}, {"params": [b]}], lr=rate, foreach=False)
    for schedule in (
        jel.schedules.constant(2.0, group="1"),
        jel.schedules.piecewise([(0, {"*": {"lr": 2.0}, "0": {"lr": 3}})]),
    ):
        refuses(lambda s=schedule: jel.Scheduler(optimizer, T, s), optimizer, "share one tensor")
    jel.Scheduler(optimizer, T, TWICE)
    assert float(rate) == pytest.approx(0.2)


def test_what_is_observed():
    optimizer = sgd(make_model())
    scheduler = jel.Scheduler(optimizer, T, Probing())
    refuses(lambda: scheduler.observe(los=1.0), optimizer, "and not los")
    optimizer.step()
    refuses(scheduler.step, optimizer, r"Probing observes what it was not told: call observe\(probe_loss=...\)")


def test_a_decision_that_fails_in_the_middle_leaves_the_optimizer_as_it_was():
    class Failing(jel.Controller):
        def decide(self, observation):
            return {"*": {"lr": 2.0 if observation["progress"] < 0.5 else math.inf}}

    optimizer = adamw(make_model())
    scheduler = jel.Scheduler(optimizer, 4, Failing(), LinearLR(optimizer), interval=1)
    stepped(scheduler, optimizer, 1)
    optimizer.step()
    refuses(scheduler.step, optimizer, "finite number above 0")


def test_an_inner_scheduler_that_fails_leaves_the_optimizer_as_it_was():
    def factor(step):
        if step == 2:
            raise ArithmeticError("the user's own")
        return 1.0

    optimizer = adamw(make_model(), tensor=True)
    scheduler = jel.Scheduler(optimizer, T, TWICE, LambdaLR(optimizer, factor))
    stepped(scheduler, optimizer, 1)
    optimizer.step()
    before = groups_and_hooks(optimizer)
    with pytest.raises(ArithmeticError):
        scheduler.step()
    assert groups_and_hooks(optimizer) == before


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda state: state.clear(), "not the state of a jel.Scheduler"),
        (lambda state: state.update(version=9), "not the state of a jel.Scheduler"),
        (lambda state: state.update(schedule="of another"), "followed another schedule"),
        (lambda state: state.update(total_steps=7), "total_steps 7, this scheduler 100"),
        (lambda state: state.update(multipliers=[{}]), "has 1 param groups"),
        (lambda state: state.update(inner=None), "inner scheduler"),
        (lambda state: state.update(last_epoch="x"), "malformed"),
        (lambda state: state.pop("base"), "malformed"),
        (lambda state: state["base"].pop(), "malformed"),
        (lambda state: state.update(observed={"train_loss": "high"}), "malformed"),
    ],
)
def test_a_state_of_another_run_is_refused_before_anything_changes(damage, message):
    optimizer = adamw(make_model())
    scheduler = jel.Scheduler(
        optimizer, T, jel.schedules.piecewise([(0.0, {"*": {"lr": 2.0}}), (0.02, {})]), LinearLR(optimizer)
    )
    state = copy.deepcopy(scheduler.state_dict())
    stepped(scheduler, optimizer, 3)
    kept = copy.deepcopy(scheduler.state_dict())
    damage(state)
    refuses(lambda: scheduler.load_state_dict(state), optimizer, message)
    assert scheduler.state_dict() == kept
