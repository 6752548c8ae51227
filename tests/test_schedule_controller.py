"""The learned policy as a controller, and its schedule, exported and replayed."""

from __future__ import annotations

import json
import math

import pytest
import torch

from jel import (
    Contract,
    GaussianPolicy,
    GroupContract,
    JelError,
    Knob,
    PolicyController,
    ScheduleController,
    export_schedule,
    load_schedule,
    save_policy,
    save_schedule,
)
from jel.schedule import shape_of
from tests.jel_parts import FEEDBACK, knobs, lively_policy

DECISIONS = [t / 561 for t in range(0, 561, 50)]  # the paper's 12 decision points


def test_policy_controller_moves_with_progress_and_refuses_another_policys_state():
    controller = PolicyController(lively_policy())
    decided = [controller.decide({"progress": p})["*"] for p in DECISIONS]
    assert len({d["lr"] for d in decided}) == len(DECISIONS)
    with pytest.raises(JelError, match="was controlled by policy"):
        PolicyController(GaussianPolicy()).load_state_dict(controller.state_dict())


def test_a_policy_with_feedback_acts_on_what_it_sees():
    controller = PolicyController(lively_policy(features=FEEDBACK))
    assert controller.observes == {"progress", "probe_loss"}
    decided = [controller.decide({"progress": 0.5, "probe_loss": loss})["*"]["lr"] for loss in (0.5, 2.0, 8.0)]
    assert len(set(decided)) == 3
    seen = {"progress": 0.5, "probe_loss": math.nan, "step": 7.0}  # more than it asked for, and nothing measured yet
    assert math.isfinite(controller.decide(seen)["*"]["lr"]) and set(seen) == {"progress", "probe_loss", "step"}


def test_the_action_range_bounds_what_is_deployed_and_is_part_of_the_policys_name(tmp_path):
    save_policy(lively_policy(knobs=knobs(1.5)), tmp_path / "p", {})
    narrow, wide = PolicyController(tmp_path / "p"), PolicyController(lively_policy())
    replay = ScheduleController(export_schedule(lively_policy(knobs=knobs(1.5)), DECISIONS))
    for p in DECISIONS:
        got, reference = (c.decide({"progress": p})["*"] for c in (narrow, wide))
        assert replay.decide({"progress": p})["*"] == got
        for name, value in got.items():
            assert 1 / 1.5 <= value <= 1.5
            share = math.log(reference[name]) / math.log(100)  # of the way to the bound
            assert value == pytest.approx(1.5**share, rel=1e-6)
    with pytest.raises(JelError, match="was controlled by policy"):  # equal weights, yet not the same policy
        narrow.load_state_dict(wide.state_dict())


def test_policy_controller_does_not_follow_later_training():
    policy = lively_policy()
    controller = PolicyController(policy)
    before = controller.decide({"progress": 0.5})
    with torch.no_grad():
        policy.net[0].weight.mul_(-1)
    assert controller.decide({"progress": 0.5}) == before


def test_a_schedule_needs_a_policy_of_progress_alone():
    for features in (FEEDBACK, ("log_probe_loss",)):
        with pytest.raises(JelError, match="this needs one of progress alone"):
            export_schedule(lively_policy(features=features), DECISIONS)


def test_a_schedule_holds_all_knobs_of_the_policy():
    policy = lively_policy(knobs=(*knobs(), Knob("head", "lr", ("lm_head",), bounds=(0.5, 2.0))))
    replay, learned = ScheduleController(export_schedule(policy, DECISIONS)), PolicyController(policy)
    for p in DECISIONS:
        decided = replay.decide({"progress": p})
        assert decided == learned.decide({"progress": p}) and set(decided) == {"*", "lm_head"}
        assert 0.5 <= decided["lm_head"]["lr"] / decided["*"]["lr"] <= 2.0 + 1e-6


def test_schedule_replays_the_policy_exactly_and_holds_in_between(tmp_path):
    policy = lively_policy()
    save_schedule(export_schedule(policy, DECISIONS), tmp_path / "s.json")
    replay, learned = ScheduleController(tmp_path / "s.json"), PolicyController(policy)
    for i, p in enumerate(DECISIONS):
        want = learned.decide({"progress": p})
        assert replay.decide({"progress": p}) == want
        assert replay.decide({"progress": (p + (DECISIONS + [1.0])[i + 1]) / 2}) == want


@pytest.mark.parametrize("points", [[], [0.1, 0.5], [0.0, 0.5, 0.5], [0.0, 0.6, 0.5], [0.0, 1.0], [float("nan")]])
def test_schedule_refuses_bad_decision_points(points):
    with pytest.raises(JelError, match="progress|decisions"):
        export_schedule(lively_policy(), points)


def test_schedule_refuses_bad_files(tmp_path):
    good = export_schedule(lively_policy(), DECISIONS)
    entry = lambda multipliers: {**good, "decisions": [{"progress": 0.0, "multipliers": multipliers}]}
    bad = [
        [],
        {**good, "version": 3},
        {**good, "decisions": "none"},
        {**good, "decisions": [1]},
        entry(None),
        entry({"*": {"lr": 0.0}}),
        entry({"*": {"lr": float("nan")}}),
        entry({"*": 2.0}),
    ]
    for i, value in enumerate(bad):
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps(value))
        with pytest.raises(JelError) as e:
            load_schedule(path)
        assert "\n" not in str(e.value)
    with pytest.raises(JelError, match="does not exist"):
        ScheduleController(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text(json.dumps(good)[:-9])
    with pytest.raises(JelError, match="not JSON"):
        ScheduleController(tmp_path / "torn.json")
    with pytest.raises(JelError, match="another schedule"):
        ScheduleController(good).load_state_dict(ScheduleController(good).state_dict() | {"decisions": []})


def test_a_policys_contract_travels_to_its_schedule(tmp_path):
    contract = Contract((GroupContract("*", "adamw", {"lr": 1e-3}),), "constant", 100)
    save_policy(lively_policy(), tmp_path / "p", {"contract": contract.to_json(), "decay_carry": 99})
    controller = PolicyController(tmp_path / "p")
    schedule = export_schedule(controller.policy, DECISIONS, controller.contract, controller.decay_carry)
    replay = ScheduleController(json.loads(json.dumps(schedule)))
    assert replay.contract == controller.contract == contract and replay.decay_carry == controller.decay_carry == 99
    assert ScheduleController(shape_of(schedule)).decay_carry == 0  # it fits any optimizer
    with pytest.raises(JelError, match="schedule: its decay_carry is -1, not a number of tokens"):
        ScheduleController({**schedule, "decay_carry": -1})
    save_policy(lively_policy(), tmp_path / "bad", {"contract": {"groups": 3}})
    with pytest.raises(JelError, match="policy card of .*bad: its contract is malformed"):
        PolicyController(tmp_path / "bad")
    save_policy(lively_policy(), tmp_path / "bad", {"decay_carry": "some"})
    with pytest.raises(JelError, match="policy card of .*bad: its decay_carry is 'some'"):
        PolicyController(tmp_path / "bad")


def test_schedules_of_version_1_still_load(tmp_path):
    old = {
        "format": "jel-schedule",
        "version": 1,
        "source": "policy",
        "decisions": [{"progress": 0.0, "multipliers": {}}],
    }
    (tmp_path / "old.json").write_text(json.dumps(old))
    controller = ScheduleController(tmp_path / "old.json")
    assert controller.decide({"progress": 0.5}) == {} and controller.contract is None and controller.knobs == ()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"contract": 3}, "contract is malformed"),
        ({"knobs": 3}, "knobs are no list"),
        ({"knobs": [{}]}, "describes no knob"),
        ({"base_curve": [[0.1]]}, "base_curve must be a list"),
        ({"base_curve": [[0.1, float("nan")]]}, "base_curve must be a list"),
        ({"base_curve": [[0.2, 1.0], [0.1, 1.0]]}, "base_curve must rise"),
        ({"decisions": [{"progress": 0.0, "multipliers": {"*": {"lr": 1e6}}}]}, "outside 0.01..100"),
    ],
)
def test_what_a_schedule_of_version_2_may_not_hold(change, message):
    good = export_schedule(lively_policy(), DECISIONS)
    ScheduleController(good)
    with pytest.raises(JelError, match=message):
        ScheduleController({**good, **change})
