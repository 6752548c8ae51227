"""The promises of a controller, as tests for one of your own: subclass `ControllerCases` and run pytest.

    from jel.testing import ControllerCases

    class TestMine(ControllerCases):
        def make(self):
            return MyController()

Nothing here imports pytest; any runner that calls the `test_` methods will do.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from typing import Any

import torch

from jel.controller import Controller, Decision, as_decision
from jel.features import OBSERVATIONS
from jel.knobs import apply_multipliers, validate_multipliers

STEPS = 561
DECISIONS = tuple(t / STEPS for t in range(0, STEPS, 50))  # the paper's 12 decision points


def plausible_observation(controller: Controller, progress: float) -> dict[str, float]:
    """Values of exactly what the controller says it observes, as a run would show them that learns."""
    known = {"progress": progress, "step": round(progress * STEPS), "grad_norm": 0.5 + progress}
    losses = {"train_loss": 4.0 - progress, "probe_loss": 4.1 - progress}
    return {name: {**known, **losses}.get(name, 4.1 - progress) for name in controller.observes}


def through_json(value: Any) -> Any:
    """A copy of a state by way of JSON; tensors are copied as they are. Anything else fails."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        assert all(isinstance(key, str) for key in value), "the keys of a state are strings"
        return {key: through_json(v) for key, v in value.items()}
    if isinstance(value, list):
        return [through_json(v) for v in value]
    return json.loads(json.dumps(value, allow_nan=False))


class ControllerCases:
    """What a training loop relies on. Subclasses define `make()`: a fresh controller, the same one every time."""

    groups: Sequence[str] = ("lm_head", "wte", "matrices")  # names of param groups that the controller may name
    reason = 1e4  # no multiplier outside [1 / reason, reason]

    def make(self) -> Controller:
        raise NotImplementedError

    def decide_all(self, controller: Controller, progresses: Sequence[float] = DECISIONS) -> list[Decision]:
        return [as_decision(controller.decide(plausible_observation(controller, p))) for p in progresses]

    def test_observes_only_what_there_is(self) -> None:
        observes = self.make().observes
        assert not isinstance(observes, str) and set(observes) <= OBSERVATIONS

    def test_multipliers_are_valid_all_along(self) -> None:
        for decision in self.decide_all(self.make(), [*DECISIONS, 0.9999]):
            validate_multipliers(decision.multipliers, self.groups)
            values = [v for own in decision.multipliers.values() for v in own.values()]
            assert all(isinstance(v, float) and 1 / self.reason <= v <= self.reason for v in values)

    def test_param_groups_take_them(self) -> None:
        controller = self.make()
        groups: list[dict[str, Any]] = [{"name": name} for name in self.groups]
        base = [{"lr": 0.1, "weight_decay": 0.2} for _ in self.groups]
        decision = as_decision(controller.decide(plausible_observation(controller, 0.0)))
        apply_multipliers(groups, base, decision.multipliers)
        assert all(math.isfinite(g["lr"]) and math.isfinite(g["weight_decay"]) for g in groups)

    def test_deterministic(self) -> None:
        assert self.decide_all(self.make()) == self.decide_all(self.make())

    def test_leaves_the_observation_alone(self) -> None:
        controller = self.make()
        for progress in DECISIONS:
            seen = plausible_observation(controller, progress)
            before = copy.deepcopy(seen)
            controller.decide(seen)
            assert seen == before

    def test_what_it_returns_is_the_callers(self) -> None:
        controller, expected = self.make(), copy.deepcopy(self.decide_all(self.make()))
        for progress, want in zip(DECISIONS, expected):
            got = as_decision(controller.decide(plausible_observation(controller, progress)))
            assert got == want
            for own in got.multipliers.values():
                own.clear()  # type: ignore[attr-defined]
            got.multipliers.clear()  # type: ignore[attr-defined]

    def test_state_round_trip_continues_identically(self) -> None:
        controller, resumed = self.make(), self.make()
        self.decide_all(controller, DECISIONS[:5])
        saved = through_json(controller.state_dict())
        after = self.decide_all(controller, DECISIONS[5:])
        resumed.load_state_dict(through_json(saved))
        assert self.decide_all(resumed, DECISIONS[5:]) == after
        assert through_json(resumed.state_dict()) == through_json(controller.state_dict())

    def test_saved_state_does_not_change_later(self) -> None:
        controller = self.make()
        self.decide_all(controller, DECISIONS[:3])
        state = controller.state_dict()
        saved = through_json(state)
        self.decide_all(controller, DECISIONS[3:])
        assert state == saved
