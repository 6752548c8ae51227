"""The controller that a flag names."""

from __future__ import annotations

import importlib
import inspect

from jel.controller import Controller, PolicyController
from jel.errors import JelError
from jel.features import OBSERVATIONS
from jel.schedule import ScheduleController


def load_controller(spec: str, policy: str | None = None) -> Controller | None:
    """The controller that a flag names, or None for "none".

    "jel": the learned policy at path `policy`, or the shipped one. "schedule": replays the exported schedule at path
    `policy`. "PYTHON.PATH:Class": a class of your own, made without arguments, or with `policy=` if one is given.
    Raises `JelError` for a name that does not import, or a class that does not keep the contract.
    """
    if spec == "none":
        if policy:
            raise JelError("a policy is given, but the controller is none; choose jel, or leave the policy out")
        return None
    if spec == "jel":
        return PolicyController(policy)
    if spec == "schedule":
        if not policy:
            raise JelError("controller schedule needs the path of an exported schedule as its policy")
        return ScheduleController(policy)
    return _make(_imported_class(spec), spec, policy)


def _imported_class(spec: str) -> type:
    module_name, colon, class_name = spec.partition(":")
    if not (colon and module_name and class_name):
        raise JelError(f"unknown controller {spec!r}; use none, jel, schedule or PYTHON.PATH:Class")
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
    for method in ("decide", "state_dict", "load_state_dict"):
        if not callable(getattr(cls, method, None)):
            raise JelError(f"controller {spec} has no method {method}(); see jel.controller.Controller")
    arguments = {"policy": policy} if policy else {}
    try:
        inspect.signature(cls).bind(**arguments)
    except TypeError as e:
        given = "with policy=" if policy else "without arguments"
        raise JelError(f"controller {spec} cannot be made {given} ({e})") from None
    controller = cls(**arguments)
    observes = getattr(controller, "observes", None)
    if not isinstance(observes, (set, frozenset, tuple, list)):
        raise JelError(f"controller {spec}: observes must be a set of names, not {observes!r}")
    if unknown := set(observes) - OBSERVATIONS:
        raise JelError(
            f"controller {spec} observes unknown {sorted(map(str, unknown))}; "
            f"there are {', '.join(sorted(OBSERVATIONS))}"
        )
    return controller
