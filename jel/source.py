"""What a user hands over as a schedule or controller, made one thing: a controller that knows its contract.

Accepted are an exported schedule (a dict, or the path of its JSON), the path of a policy, a registered name, and any
object that keeps the controller's contract (jel/controller.py).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from jel.contract import ANY, Contract
from jel.controller import Controller, PolicyController
from jel.decisions import evenly_spaced
from jel.errors import JelError
from jel.files import read_json
from jel.hyperparameters import group_names, has
from jel.lhopt import LhoptController
from jel.policy_lstm import FORMAT as LHOPT_FORMAT
from jel.registry import CONTROLLERS, check_controller
from jel.schedule import FORMAT, ScheduleController, checked_schedule, export_schedule, shape_of

MODES = ("absolute", "shape")
DECISIONS = 20  # a run, by a controller that does not say how many it wants


class Source:
    """`controller`; `contract`: None where unknown; `name`: what error messages call it; `id`: of this very schedule.

    `mode` "shape" leaves out groups and hyperparameters that the optimizer does not have. Raises `JelError` for what is
    none of the accepted things, and for the shape of a controller with feedback.
    """

    def __init__(self, given: Any, mode: str, optimizer: Optimizer):
        if mode not in MODES:
            raise JelError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}")
        self.name, controller = _resolved(given)
        if mode == "shape":
            if not isinstance(controller, ScheduleController):
                controller = ScheduleController(_schedule_of(controller, self.name))
            shape = shape_of({"format": FORMAT, "version": 1, "decisions": controller.decisions})
            controller = ScheduleController({**shape, "decisions": _only(shape["decisions"], optimizer)})
        self.controller: Controller = controller
        self.contract: Contract | None = getattr(controller, "contract", ANY)
        self.knobs = tuple(getattr(controller, "knobs", ()))
        self.base_curve = list(getattr(controller, "base_curve", []))
        if isinstance(controller, ScheduleController):
            text = json.dumps(controller.decisions, sort_keys=True)
        else:
            text = f"{type(controller).__module__}.{type(controller).__qualname__}"
        self.id = hashlib.sha256(text.encode()).hexdigest()[:16]

    def decision_steps(self, total_steps: int, interval: int | None) -> list[int]:
        """The steps at which it decides, 0 first: a schedule's own points, else every `interval` steps, else as many as
        the controller wants, evenly spaced. Raises `JelError` for the interval of a schedule.
        """
        if isinstance(self.controller, ScheduleController):
            if interval is not None:
                raise JelError("interval= is for a controller: a schedule has decision points of its own")
            return steps_of(self.controller.points, total_steps)
        if interval is not None:
            return list(range(0, total_steps, interval))
        if own := getattr(self.controller, "decision_steps", None):
            return own(total_steps)
        return evenly_spaced(getattr(self.controller, "decisions", DECISIONS), total_steps)

    def check_contract(self, optimizer: Optimizer, total_steps: int, base_schedule: str) -> None:
        """Raise `JelError` where what was learned was learned against another base, or nobody knows against which."""
        if self.contract is None:
            raise JelError(
                f"{self.name} does not say what it was learned against, so its multipliers mean nothing here; "
                "mode='shape' keeps your rate as the peak"
            )
        if misfit := self.contract.misfit(optimizer, total_steps, base_schedule):
            raise JelError(f"{self.name} does not fit: {misfit}; mode='shape' keeps your rate as the peak")


def steps_of(points: Sequence[float], total_steps: int) -> list[int]:
    """The first step t with t / total_steps at or above each point; points that share a step are one."""
    steps = []
    for point in points:
        step = max(0, math.ceil(point * total_steps) - 1)
        while step / total_steps < point:
            step += 1
        steps.append(step)
    return sorted({step for step in steps if step < total_steps})


def _only(decisions: list[dict[str, Any]], optimizer: Optimizer) -> list[dict[str, Any]]:
    """The decisions as far as they concern groups and hyperparameters that this optimizer has."""
    groups = dict(zip(group_names(optimizer), optimizer.param_groups))
    found = []
    for row in decisions:
        kept = {name: own for name, own in row["multipliers"].items() if name == "*" or name in groups}
        reached = {name: list(groups.values()) if name == "*" else [groups[name]] for name in kept}
        multipliers = {
            n: {k: v for k, v in own.items() if any(has(g, k) for g in reached[n])} for n, own in kept.items()
        }
        found.append({"progress": row["progress"], "multipliers": multipliers})
    if not any(own for row in found for own in row["multipliers"].values()):
        raise JelError("the schedule names no param group and no hyperparameter that this optimizer has")
    return found


def _resolved(given: Any) -> tuple[str, Controller]:
    if isinstance(given, dict):
        return "the schedule", ScheduleController(checked_schedule(given))
    if isinstance(given, str) and given in CONTROLLERS:
        return given, CONTROLLERS[given]()
    if isinstance(given, (str, Path)):
        return _from_path(Path(given))
    check_controller(given, type(given).__name__)
    return type(given).__name__, given


def _from_path(path: Path) -> tuple[str, Controller]:
    names = ", ".join(sorted(CONTROLLERS))
    if path.suffix not in (".json", ".safetensors"):
        raise JelError(f"{path} is no schedule: give its .json, a dict, a controller, or a name of {names}")
    if path.suffix == ".json":
        record = read_json(path, "schedule")
        if isinstance(record, dict) and record.get("format") == FORMAT:
            return f"schedule {path}", ScheduleController(checked_schedule(record, f"schedule {path}"))
        if isinstance(record, dict) and record.get("format") == LHOPT_FORMAT:
            return f"policy {path}", LhoptController(path)
        if not (isinstance(record, dict) and record.get("format") == "jel-policy"):
            raise JelError(f"{path} holds neither a schedule nor the card of a policy")
    return f"policy {path}", PolicyController(path)


def _schedule_of(controller: Controller, name: str) -> dict:
    if not isinstance(controller, PolicyController) or controller.observes != {"progress"}:
        raise JelError(f"mode 'shape' needs a schedule, or a policy of progress alone; {name} decides while it watches")
    return export_schedule(controller.policy, [i / DECISIONS for i in range(DECISIONS)])
