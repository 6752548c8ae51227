"""The conformance suite that every controller must pass (jel/testing.py), run for ours."""

from __future__ import annotations

import math

import pytest

from jel import (
    Controller,
    Decision,
    JelError,
    Knob,
    NullController,
    PolicyController,
    ScheduleController,
    as_decision,
    export_schedule,
)
from jel.testing import DECISIONS, ControllerCases
from tests.jel_parts import FEEDBACK, knobs, lively_policy


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


class TestNullController(ControllerCases):
    def make(self):
        return NullController()


class TestPolicyController(ControllerCases):
    reason = 100.001  # paper 3.3

    def make(self):
        return PolicyController(lively_policy())


class TestFeedbackController(ControllerCases):
    def make(self):
        return PolicyController(lively_policy(features=FEEDBACK, knobs=(*knobs(), Knob("head", "lr", ("lm_head",)))))


class TestScheduleController(ControllerCases):
    def make(self):
        return ScheduleController(export_schedule(lively_policy(), DECISIONS))


class TestHandWritten(ControllerCases):
    def make(self):
        return Halving()


class TestReturning(ControllerCases):
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


class Forgetful(Halving):
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Sharing(NullController):
    kept = {"*": {"lr": 1.0, "weight_decay": 1.0}}

    def decide(self, observation):
        return self.kept


class Wild(NullController):
    def decide(self, observation):
        return {"*": {"lr": 1e9}}


class Curious(NullController):
    observes = frozenset({"weather"})


class Drifting(NullController):
    made = 0

    def __init__(self):
        Drifting.made += 1
        self.factor = 1.0 + Drifting.made

    def decide(self, observation):
        return {"*": {"lr": self.factor}}


@pytest.mark.parametrize(
    "broken, test",
    [
        (Forgetful, "test_state_round_trip_continues_identically"),
        (Sharing, "test_what_it_returns_is_the_callers"),
        (Drifting, "test_deterministic"),
        (Wild, "test_multipliers_are_valid_all_along"),
        (Curious, "test_observes_only_what_there_is"),
    ],
)
def test_the_suite_catches_a_broken_controller(broken, test):
    cases = type("Cases", (ControllerCases,), {"make": lambda self: broken()})()
    with pytest.raises((AssertionError, KeyError)):
        getattr(cases, test)()
