"""JEL: a learned controller for learning rate and weight decay. The names below are the public ones."""

from jel.actions import IDENTITY, apply_multipliers
from jel.controller import OBSERVATIONS, Controller, NullController, PolicyController, load_controller
from jel.errors import JelError
from jel.policy import GaussianPolicy, default_policy_path, load_policy, save_policy
from jel.schedule import ScheduleController, export_schedule, load_schedule, save_schedule

__all__ = [
    "IDENTITY",
    "OBSERVATIONS",
    "Controller",
    "GaussianPolicy",
    "JelError",
    "NullController",
    "PolicyController",
    "ScheduleController",
    "apply_multipliers",
    "default_policy_path",
    "export_schedule",
    "load_controller",
    "load_policy",
    "load_schedule",
    "save_policy",
    "save_schedule",
]
