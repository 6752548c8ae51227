"""The controllers that a flag names, and those of a user's own that break the contract."""

from __future__ import annotations

import pytest

from jel import (
    JelError,
    NullController,
    PolicyController,
    export_schedule,
    load_controller,
    save_policy,
    save_schedule,
)
from tests.jel_parts import lively_policy


def test_named_controllers(tmp_path):
    save_policy(lively_policy(), tmp_path / "p", {})
    save_schedule(export_schedule(lively_policy(), [0.0, 0.5]), tmp_path / "s.json")
    assert load_controller("none") is None
    learned = load_controller("jel", str(tmp_path / "p.safetensors"))
    replay = load_controller("schedule", str(tmp_path / "s.json"))
    assert learned.decide({"progress": 0.0}) == replay.decide({"progress": 0.0})
    assert isinstance(load_controller("jel.controller:NullController"), NullController)
    assert isinstance(load_controller("jel.controller:PolicyController", str(tmp_path / "p")), PolicyController)


def test_own_controllers_that_break_the_contract(tmp_path, monkeypatch):
    (tmp_path / "own_controllers.py").write_text(
        "class Good:\n    observes = {'step'}\n    def __init__(self, policy='p0'): self.policy = policy\n"
        "    def decide(self, observation): return {}\n"
        "    def state_dict(self): return {}\n    def load_state_dict(self, state): pass\n"
        "class NoDecide:\n    def state_dict(self): pass\n    def load_state_dict(self, state): pass\n"
        "class Unknown(Good):\n    observes = {'hessian'}\n"
        "class Word(Good):\n    observes = 'step'\n"
        "class Needy(Good):\n    def __init__(self, rate): pass\n"
        "class Bare(Good):\n    def __init__(self): pass\n"
        "number = 3\n"
    )
    (tmp_path / "broken_controllers.py").write_text("raise RuntimeError('no\\n luck')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_controller("own_controllers:Good").policy == "p0"
    assert load_controller("own_controllers:Good", "here").policy == "here"
    cases = {
        "own_controllers:NoDecide": "no method decide",
        "own_controllers:Unknown": "hessian",
        "own_controllers:Word": "set of names",
        "own_controllers:Needy": "without arguments",
        "own_controllers:Missing": "no class Missing",
        "own_controllers:number": "no class number",
        "broken_controllers:X": "no luck",
        "no_such_module_here:X": "does not import",
        "jell": "unknown controller",
        ":X": "unknown controller",
        "own_controllers:": "unknown controller",
        "schedule": "needs the path",
    }
    for spec, message in cases.items():
        with pytest.raises(JelError, match=message) as e:
            load_controller(spec)
        assert "\n" not in str(e.value)
    for spec in ("own_controllers:Bare", "none", "jel", "schedule"):
        with pytest.raises(JelError):
            load_controller(spec, str(tmp_path / "absent"))
