"""JEL: learned control of hyperparameters while a model trains. The names below are the public ones."""

from typing import TYPE_CHECKING, Any

from jel import schedules
from jel.contract import ANY, Contract, GroupContract
from jel.controller import Controller, Decision, NullController, PolicyController, as_decision
from jel.errors import JelError
from jel.features import FEATURES, OBSERVATIONS
from jel.guard import Guard
from jel.inner_optimizer import InnerOptimizer, adamw
from jel.knobs import IDENTITY, Knob, Multipliers, apply_multipliers, validate_multipliers
from jel.lhopt import LhoptController
from jel.observer import Observer
from jel.policy import GaussianPolicy, default_policy_path, load_policy, save_policy
from jel.registry import load_controller
from jel.schedule import ScheduleController, export_schedule, load_schedule, make_schedule, save_schedule
from jel.scheduler import Scheduler
from jel.validation_guard import ValidationGuard

if TYPE_CHECKING:
    from jel.fitting.fit import fit as fit
else:

    def fit(task: Any, **choices: Any) -> Any:
        """Learn a schedule for a task from short episodes: see `jel.fitting.fit.fit`. Imports what learning takes."""
        from jel.fitting.fit import fit as learn

        return learn(task, **choices)


__all__ = [
    "fit",
    "schedules",
    "make_schedule",
    "Scheduler",
    "Guard",
    "GroupContract",
    "Contract",
    "ANY",
    "FEATURES",
    "IDENTITY",
    "InnerOptimizer",
    "LhoptController",
    "Observer",
    "ValidationGuard",
    "adamw",
    "OBSERVATIONS",
    "Controller",
    "Decision",
    "GaussianPolicy",
    "JelError",
    "Knob",
    "Multipliers",
    "NullController",
    "PolicyController",
    "ScheduleController",
    "apply_multipliers",
    "as_decision",
    "default_policy_path",
    "export_schedule",
    "load_controller",
    "load_policy",
    "load_schedule",
    "save_policy",
    "save_schedule",
    "validate_multipliers",
]
