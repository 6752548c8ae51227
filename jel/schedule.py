"""A policy's multipliers over progress, exported as JSON and replayed without the policy.

{"format": "jel-schedule", "version": 1, "source": "policy <sha256>",
 "decisions": [{"progress": 0.0, "multipliers": {"*": {"lr": 1.3, "weight_decay": 0.9}}}, ...]}
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path

from jel.controller import Controller
from jel.errors import JelError
from jel.files import json_bytes, read_json, write_files
from jel.knobs import Multipliers, validate_multipliers
from jel.policy import GaussianPolicy, multiplier_table, policy_digest

FORMAT, VERSION = "jel-schedule", 1


def export_schedule(policy: GaussianPolicy, progresses: Sequence[float]) -> dict:
    """The schedule of the policy's mean multipliers at the decision points `progresses`: 0 first, rising, below 1.

    Raises `JelError` for other decision points, or a policy that is not one of progress alone.
    """
    decisions = multiplier_table(policy, progresses)
    return _checked(
        {"format": FORMAT, "version": VERSION, "source": f"policy {policy_digest(policy)}", "decisions": decisions},
        "schedule",
    )


def save_schedule(schedule: dict, path: str | Path) -> None:
    """Write the schedule, atomically; raises `JelError` if it is malformed or cannot be written."""
    write_files({Path(path): json_bytes(_checked(schedule, "schedule"))})


def load_schedule(path: str | Path) -> dict:
    """Read a schedule; raises `JelError` in one line if it is missing or malformed."""
    return _checked(read_json(Path(path), "schedule"), f"schedule {path}")


def _checked(schedule: dict, what: str) -> dict:
    if not isinstance(schedule, dict) or (schedule.get("format"), schedule.get("version")) != (FORMAT, VERSION):
        raise JelError(f"{what} is not a {FORMAT} of version {VERSION}")
    decisions = schedule.get("decisions")
    if not isinstance(decisions, list) or not decisions or not all(isinstance(d, dict) for d in decisions):
        raise JelError(f"{what} has no list of decisions")
    points = [d.get("progress") for d in decisions]
    if not all(isinstance(p, Real) for p in points) or not (
        points[0] == 0 and points[-1] < 1 and all(a < b for a, b in zip(points, points[1:]))
    ):
        raise JelError(f"{what}: the progress of its decisions must start at 0, rise, and stay below 1")
    for i, decision in enumerate(decisions):
        multipliers = decision.get("multipliers")
        try:
            validate_multipliers(
                multipliers, multipliers
            )  # any group may be named: which ones the run has is not known here
        except JelError as e:
            raise JelError(f"{what}, decision {i}: {e}") from None
    return schedule


class ScheduleController(Controller):
    """Replays a schedule: the last decision point at or before the present progress holds.

    `schedule`: what `export_schedule` or `load_schedule` gives, or the path of a saved one.
    """

    def __init__(self, schedule: dict | str | Path):
        checked = _checked(schedule, "schedule") if isinstance(schedule, dict) else load_schedule(schedule)
        self.decisions = copy.deepcopy(checked["decisions"])
        self.points = [d["progress"] for d in self.decisions]

    def decide(self, observation: Mapping[str, float]) -> Multipliers:
        held = self.decisions[bisect_right(self.points, observation["progress"]) - 1]
        return copy.deepcopy(held["multipliers"])

    def state_dict(self) -> dict:
        return {"decisions": copy.deepcopy(self.decisions)}

    def load_state_dict(self, state: dict) -> None:
        if state.get("decisions") != self.decisions:
            raise JelError("the saved run followed another schedule: resume with the schedule that the run began with")
