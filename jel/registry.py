"""The controller that a flag names."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

from jel.controller import Controller, PolicyController
from jel.errors import JelError
from jel.features import OBSERVATIONS
from jel.lhopt import LhoptController, ProbedLhopt
from jel.schedule import ScheduleController

# name -> what makes the controller for `jel.Scheduler`, whose loop may tell a validation loss
CONTROLLERS: dict[str, Callable[[], Controller]] = {"jel": PolicyController, "lhopt": LhoptController}


def load_controller(spec: str, policy: str | None = None) -> Controller | None:
    """The controller that a flag names, or None for "none".

    "jel": the learned policy at path `policy`, or the shipped one; "lhopt" likewise, a recurrent one that is told the
    loop's probe loss and was trained to decide every twentieth of a run. "schedule": replays the exported schedule at
    path `policy`. "PYTHON.PATH:Class": a class of your own, made without arguments, or with `policy=` if one is given.
    Raises `JelError` for a name that does not import, or a class that does not keep the contract.
    """
    if spec == "none":
        if policy:
            raise JelError("a policy is given, but the controller is none; choose jel, or leave the policy out")
        return None
    if spec == "jel":
        return PolicyController(policy)
    if spec == "lhopt":
        return ProbedLhopt(policy)
    if spec == "schedule":
        if not policy:
            raise JelError("controller schedule needs the path of an exported schedule as its policy")
        return ScheduleController(policy)
    return _make(_imported_class(spec), spec, policy)


def _imported_class(spec: str) -> type:
    module_name, colon, class_name = spec.partition(":")
    if not (colon and module_name and class_name):
        raise JelError(f"unknown controller {spec!r}; use none, jel, lhopt, schedule or PYTHON.PATH:Class")
    try:
        module = importlib.import_module(module_name)
    except Exception as e:  # a foreign module may fail in any way
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise JelError(f"controller {spec}: {module_name} does not import ({reason})") from e
    cls = getattr(module, class_name, None)
    if not inspect.isclass(cls):
        raise JelError(f"controller {spec}: {module_name} has no class {class_name}")
    return cls


def _make(cls: type, spec: str, policy: str | None) -> Controller:
    check_controller(cls, spec, observes=False)
    arguments = {"policy": policy} if policy else {}
    try:
        inspect.signature(cls).bind(**arguments)
    except TypeError as e:
        given = "with policy=" if policy else "without arguments"
        raise JelError(f"controller {spec} cannot be made {given} ({e})") from None
    controller = cls(**arguments)
    check_controller(controller, spec)
    return controller


def check_controller(controller: object, name: str, observes: bool = True) -> None:
    """Raise `JelError` unless it keeps the contract; `observes` False for a class, whose objects may set that later."""
    if observes and isinstance(controller, type):
        raise JelError(f"{name} is a class; give an object of it, {controller.__name__}(...)")
    for method in ("decide", "state_dict", "load_state_dict"):
        if not callable(getattr(controller, method, None)):
            raise JelError(f"controller {name} has no method {method}(); see jel.controller.Controller")
    if not observes:
        return
    named = getattr(controller, "observes", None)
    if not isinstance(named, (set, frozenset, tuple, list)):
        raise JelError(f"controller {name}: observes must be a set of names, not {named!r}")
    if unknown := set(named) - OBSERVATIONS:
        raise JelError(
            f"controller {name} observes unknown {sorted(map(str, unknown))}; "
            f"there are {', '.join(sorted(OBSERVATIONS))}"
        )
