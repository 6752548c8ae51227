"""The conformance suite that every controller must pass, and the controllers it is run for.

For a controller of your own, subclass it in a test file of yours and run `python -m pytest` in the checkout:

    from tests.test_controller import ControllerConformance

    class TestMine(ControllerConformance):
        def make(self):
            return MyController()
"""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from jel import (
    OBSERVATIONS,
    Controller,
    Decision,
    JelError,
    Knob,
    NullController,
    PolicyController,
    ScheduleController,
    apply_multipliers,
    as_decision,
    export_schedule,
    validate_multipliers,
)
from tests.jel_parts import FEEDBACK, knobs, lively_policy

GROUPS = ("lm_head", "wte", "matrices")
DECISIONS = [t / 561 for t in range(0, 561, 50)]  # the paper's 12 decision points


def observation(controller, progress: float) -> dict[str, float]:
    """Plausible values of exactly what the controller says it observes."""
    values = {
        "progress": progress,
        "step": round(progress * 561),
        "train_loss": 4.0 - progress,
        "probe_loss": 4.1 - progress,
        "grad_norm": 0.5 + progress,
    }
    return {name: values[name] for name in controller.observes}


def through_json(value):
    """A copy of a state by way of JSON; tensors are copied as they are; anything else fails."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        assert all(isinstance(key, str) for key in value)
        return {key: through_json(v) for key, v in value.items()}
    if isinstance(value, list):
        return [through_json(v) for v in value]
    return json.loads(json.dumps(value, allow_nan=False))


class ControllerConformance:
    """What a training loop relies on. Subclasses define `make()`: a fresh controller, the same one every time."""

    reason = 1e4  # no multiplier outside [1 / reason, reason]

    def make(self) -> Controller:
        raise NotImplementedError

    @pytest.fixture
    def controller(self):
        return self.make()

    def decide_all(self, controller, progresses=DECISIONS):
        return [as_decision(controller.decide(observation(controller, p))) for p in progresses]

    def test_observes_only_what_there_is(self, controller):
        assert not isinstance(controller.observes, str)
        assert set(controller.observes) <= OBSERVATIONS

    def test_multipliers_are_valid_all_along(self, controller):
        for decision in self.decide_all(controller, [*DECISIONS, 0.9999]):
            validate_multipliers(decision.multipliers, GROUPS)
            values = [v for own in decision.multipliers.values() for v in own.values()]
            assert all(isinstance(v, float) and 1 / self.reason <= v <= self.reason for v in values)

    def test_param_groups_take_them(self, controller):
        groups = [{"name": name} for name in GROUPS]
        base = [{"lr": 0.1, "weight_decay": 0.2} for _ in GROUPS]
        apply_multipliers(groups, base, as_decision(controller.decide(observation(controller, 0.0))).multipliers)
        assert all(math.isfinite(g["lr"]) and math.isfinite(g["weight_decay"]) for g in groups)

    def test_deterministic(self, controller):
        assert self.decide_all(controller) == self.decide_all(self.make())

    def test_leaves_the_observation_alone(self, controller):
        for progress in DECISIONS:
            seen = observation(controller, progress)
            before = copy.deepcopy(seen)
            controller.decide(seen)
            assert seen == before

    def test_what_it_returns_is_the_callers(self, controller):
        expected = self.decide_all(self.make())
        for progress, want in zip(DECISIONS, expected):
            got = as_decision(controller.decide(observation(controller, progress)))
            assert got == want
            for own in got.multipliers.values():
                own.clear()
            got.multipliers.clear()

    def test_state_round_trip_continues_identically(self, controller):
        self.decide_all(controller, DECISIONS[:5])
        saved = through_json(controller.state_dict())
        after = self.decide_all(controller, DECISIONS[5:])
        resumed = self.make()
        resumed.load_state_dict(through_json(saved))
        assert self.decide_all(resumed, DECISIONS[5:]) == after
        assert through_json(resumed.state_dict()) == through_json(controller.state_dict())

    def test_saved_state_does_not_change_later(self, controller):
        self.decide_all(controller, DECISIONS[:3])
        state = controller.state_dict()
        saved = through_json(state)
        self.decide_all(controller, DECISIONS[3:])
        assert state == saved


class Halving(Controller):
    """Written by hand, with state of its own: halves the matrices' rate whenever the probe loss has risen."""

    observes = frozenset({"probe_loss", "step"})

    def __init__(self):
        self.factor, self.last = 1.0, 4.08

    def decide(self, observation):
        if observation["probe_loss"] > self.last:
            self.factor /= 2
        self.last = observation["probe_loss"]
        return {"matrices": {"lr": self.factor}}

    def state_dict(self):
        return {"factor": self.factor, "last": self.last}

    def load_state_dict(self, state):
        self.factor, self.last = state["factor"], state["last"]


class Returning(Controller):
    """Written by hand: asks the loop to go back when the gradient has grown, and halves the rate from there."""

    observes = frozenset({"grad_norm"})

    def decide(self, observation):
        if observation["grad_norm"] > 1.0:
            return Decision({"*": {"lr": 0.5}}, go_back=50)
        return {"*": {"lr": 1.0}}


class TestNullController(ControllerConformance):
    def make(self):
        return NullController()


class TestPolicyController(ControllerConformance):
    reason = 100.001  # paper 3.3

    def make(self):
        return PolicyController(lively_policy())


class TestFeedbackController(ControllerConformance):
    def make(self):
        return PolicyController(lively_policy(features=FEEDBACK, knobs=(*knobs(), Knob("head", "lr", ("lm_head",)))))


class TestScheduleController(ControllerConformance):
    def make(self):
        return ScheduleController(export_schedule(lively_policy(), DECISIONS))


class TestHandWritten(ControllerConformance):
    def make(self):
        return Halving()


class TestReturning(ControllerConformance):
    def make(self):
        return Returning()


# -----------------------------------------------------------------------------
# decisions


def test_bare_multipliers_are_a_decision_to_go_on():
    multipliers = {"*": {"lr": 2.0}}
    assert as_decision(multipliers) == Decision(multipliers, None)
    for go_back in (None, 0, 50):
        decision = Decision(multipliers, go_back)
        assert as_decision(decision) is decision


@pytest.mark.parametrize("go_back", [-1, 1.0, True, "5", math.nan])
def test_a_return_is_a_number_of_steps(go_back):
    with pytest.raises(JelError, match="go_back is .*; it must be a number of steps, or None"):
        as_decision(Decision({}, go_back))
