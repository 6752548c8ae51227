"""A controller's multipliers over progress, as JSON that needs no policy and replays at any length.

```json
{"format": "jel-schedule", "version": 2, "source": "policy <sha256>",
 "contract": {"groups": [{"name": "*", "kind": "adamw", "base": {"lr": 0.001, "weight_decay": 0.01}}],
              "schedule": "constant", "steps": 200, "least": 50, "most": 4000},
 "knobs": [{"name": "lr", "hyperparameter": "lr", "groups": ["*"], "scale": "log", "bounds": [0.01, 100.0]}],
 "base_curve": [[0.1, 3.2], [0.2, 2.9]], "decay_carry": 51200,
 "decisions": [{"progress": 0.0, "multipliers": {"*": {"lr": 1.3, "weight_decay": 0.9}}}, ...]}
```

`progress` is the share of the run's steps taken; each decision holds until the next. `contract` (jel/contract.py) is
what it was learned against: null where that is unknown, without groups where any optimizer fits. `knobs` bound the
multipliers; `base_curve` is the training loss of the base without the schedule, over progress; `decay_carry` is the
tokens of the episodes from which a run carries its weight decay. The last four may be left out. Version 1 had none.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from jel.contract import Contract
from jel.controller import Controller, decay_carry_of
from jel.errors import JelError
from jel.files import json_bytes, read_json, write_files
from jel.knobs import LARGEST, Knob, Multipliers, multipliers_of_group, validate_multipliers
from jel.policy import GaussianPolicy, multiplier_table, policy_digest

FORMAT, VERSION = "jel-schedule", 2


def make_schedule(
    decisions: Sequence[Mapping[str, Any]],
    source: str,
    contract: Contract | None = None,
    knobs: Sequence[Knob] = (),
    base_curve: Iterable[tuple[float, float]] = (),
    decay_carry: int = 0,
) -> dict[str, Any]:
    """A schedule of `{"progress": p, "multipliers": {...}}` rows: 0 first, rising, below 1.

    Raises `JelError` for decisions, knobs or a curve that are malformed, and for multipliers outside the knobs' bounds.
    """
    whole: dict[str, Any] = {"format": FORMAT, "version": VERSION, "source": source}
    whole["contract"] = contract.to_json() if contract is not None else None
    if knobs:
        whole["knobs"] = [knob.to_json() for knob in knobs]
    if curve := [[float(p), float(loss)] for p, loss in base_curve]:
        whole["base_curve"] = curve
    if decay_carry:
        whole["decay_carry"] = decay_carry
    checked = checked_schedule({**whole, "decisions": [dict(decision) for decision in decisions]})
    return {**checked, "decisions": [_plain_decision(decision) for decision in checked["decisions"]]}


def export_schedule(
    policy: GaussianPolicy, progresses: Sequence[float], contract: Contract | None = None, decay_carry: int = 0
) -> dict:
    """The schedule of the policy's mean multipliers at the decision points `progresses`: 0 first, rising, below 1.

    `contract` and `decay_carry`: those of the policy's `PolicyController`. Raises `JelError` for other decision points,
    or a policy that is not one of progress alone.
    """
    decisions = multiplier_table(policy, progresses)
    return make_schedule(decisions, f"policy {policy_digest(policy)}", contract, policy.knobs, decay_carry=decay_carry)


def save_schedule(schedule: dict, path: str | Path) -> None:
    """Write the schedule, atomically; raises `JelError` if it is malformed or cannot be written."""
    write_files({Path(path): json_bytes(checked_schedule(schedule))})


def load_schedule(path: str | Path) -> dict:
    """Read a schedule of version 1 or 2; raises `JelError` in one line if it is missing or malformed."""
    return checked_schedule(read_json(Path(path), "schedule"), f"schedule {path}")


def _plain_decision(decision: Mapping[str, Any]) -> dict[str, Any]:
    """A checked decision in Python's own floats, for NumPy's and whatever else is a real number."""
    multipliers = {group: {k: float(m) for k, m in own.items()} for group, own in decision["multipliers"].items()}
    return {**decision, "progress": float(decision["progress"]), "multipliers": multipliers}


def contract_of(schedule: Mapping[str, Any]) -> Contract | None:
    """What the schedule was learned against; None where it does not say. Raises `JelError` for a malformed one."""
    record = schedule.get("contract")
    return None if record is None else Contract.from_json(record)


def knobs_of(schedule: Mapping[str, Any]) -> tuple[Knob, ...]:
    """The knobs that bound the schedule's multipliers; none where it does not say."""
    return tuple(Knob.from_json(record) for record in schedule.get("knobs", ()))


def bounds_of(knobs: Iterable[Knob], group: str, hyperparameter: str) -> tuple[float, float] | None:
    """The bounds that the knobs set on a group's multiplier, corrections multiplied; None where no knob reaches it."""
    low, high, reached = 1.0, 1.0, False
    for knob in knobs:
        if knob.hyperparameter == hyperparameter and ("*" in knob.groups or group in knob.groups):
            low, high, reached = low * knob.bounds[0], min(high * knob.bounds[1], LARGEST), True
    return (low, high) if reached else None


def shape_of(schedule: Mapping[str, Any]) -> dict:
    """The schedule's shape alone: every group's multipliers of a hyperparameter divided by their largest.

    The user's value then stays the peak. It fits any optimizer.
    """
    whole = {key: value for key, value in schedule.items() if key not in ("knobs", "base_curve", "decay_carry")}
    rows = copy.deepcopy(schedule["decisions"])
    names = {group for row in rows for group in row["multipliers"]}
    keys = {key for row in rows for own in row["multipliers"].values() for key in own}
    for row in rows:  # every group that is named anywhere gets the values that hold for it at every decision
        row["multipliers"] = {group: multipliers_of_group(row["multipliers"], group) for group in names}
    for group in names:
        for key in keys:
            held = [row["multipliers"][group].get(key, 1.0) for row in rows]
            for row, value in zip(rows, held):
                row["multipliers"][group][key] = value / max(held)
    return {**whole, "version": VERSION, "contract": Contract().to_json(), "decisions": rows}


# -----------------------------------------------------------------------------
# what is malformed


def checked_schedule(schedule: Any, what: str = "schedule") -> dict:
    """The schedule itself. Raises `JelError` in one line, which calls it `what`, if it is malformed."""
    if not isinstance(schedule, dict) or schedule.get("format") != FORMAT:
        raise JelError(f"{what} is not a {FORMAT}")
    if type(schedule.get("version")) is not int or schedule["version"] not in (1, VERSION):
        raise JelError(f"{what} is not a {FORMAT} of version 1 to {VERSION}")
    decisions = schedule.get("decisions")
    if not isinstance(decisions, list) or not decisions or not all(isinstance(d, dict) for d in decisions):
        raise JelError(f"{what} has no list of decisions")
    points = [d.get("progress") for d in decisions]
    if not all(isinstance(p, Real) for p in points) or not (
        points[0] == 0 and points[-1] < 1 and all(a < b for a, b in zip(points, points[1:]))
    ):
        raise JelError(f"{what}: the progress of its decisions must start at 0, rise, and stay below 1")
    try:
        contract_of(schedule)
        decay_carry_of(schedule)
        _check_curve(schedule.get("base_curve", []))
        records = schedule.get("knobs", [])
        if not isinstance(records, list):
            raise JelError("its knobs are no list")
        knobs = knobs_of(schedule)
    except JelError as e:
        raise JelError(f"{what}: {e}") from None
    for i, decision in enumerate(decisions):
        multipliers = decision.get("multipliers")
        try:  # any group may be named: which ones the run has is not known here
            validate_multipliers(multipliers, multipliers)
            _check_bounds(multipliers, knobs)
        except JelError as e:
            raise JelError(f"{what}, decision {i}: {e}") from None
    return schedule


def _check_curve(curve: Any) -> None:
    rows = isinstance(curve, list) and all(isinstance(row, list) and len(row) == 2 for row in curve)
    if not rows or not all(isinstance(x, Real) and math.isfinite(x) for row in curve for x in row):
        raise JelError("its base_curve must be a list of [progress, loss], finite")
    if any(b[0] <= a[0] for a, b in zip(curve, curve[1:])):
        raise JelError("the progress of its base_curve must rise")


def _check_bounds(multipliers: Multipliers, knobs: Sequence[Knob]) -> None:
    for group, own in multipliers.items():
        for key, value in own.items():
            bounds = bounds_of(knobs, group, key)
            if bounds and not bounds[0] * (1 - 1e-5) <= value <= bounds[1] * (1 + 1e-5):
                raise JelError(f"multiplier {group}.{key} is {value:g}, outside {bounds[0]:g}..{bounds[1]:g}")


# -----------------------------------------------------------------------------
# replay


class ScheduleController(Controller):
    """Replays a schedule: the last decision point at or before the present progress holds.

    `schedule`: what `make_schedule`, `export_schedule` or `load_schedule` gives, or the path of a saved one.
    """

    def __init__(self, schedule: dict | str | Path):
        checked = checked_schedule(schedule) if isinstance(schedule, dict) else load_schedule(schedule)
        self.decisions = [_plain_decision(decision) for decision in checked["decisions"]]
        self.points = [d["progress"] for d in self.decisions]
        self.contract, self.knobs = contract_of(checked), knobs_of(checked)
        self.decay_carry = decay_carry_of(checked)
        self.base_curve = [tuple(row) for row in checked.get("base_curve", [])]

    def decide(self, observation: Mapping[str, float]) -> Multipliers:
        held = self.decisions[bisect_right(self.points, observation["progress"]) - 1]
        return copy.deepcopy(held["multipliers"])

    def state_dict(self) -> dict:
        return {"decisions": copy.deepcopy(self.decisions)}

    def load_state_dict(self, state: dict) -> None:
        if state.get("decisions") != self.decisions:
            raise JelError("the saved run followed another schedule: resume with the schedule that the run began with")
