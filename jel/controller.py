"""The contract between a training loop and a controller, and the controllers that keep it.

Every so many steps the loop calls `decide` with what the controller declares it observes, and multiplies each param
group's base values by what it gets back (`jel.actions.apply_multipliers`) until the next decision.

| observation  | meaning, at the moment of the decision                                          |
|--------------|---------------------------------------------------------------------------------|
| `progress`   | t / T in [0, 1): steps taken over steps planned (the paper's only one)          |
| `step`       | t, steps taken                                                                  |
| `train_loss` | training loss of the last step; NaN before the first                            |
| `probe_loss` | mean loss over the fixed probe batches; costs the loop a forward pass over them |
| `grad_norm`  | global L2 norm of the last step's gradient; NaN before the first                |
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path

from jel.actions import IDENTITY
from jel.errors import JelError
from jel.policy import (
    GaussianPolicy,
    default_policy_path,
    load_policy,
    numpy_multipliers,
    policy_digest,
    progress_weights,
)

OBSERVATIONS = frozenset({"progress", "step", "train_loss", "probe_loss", "grad_norm"})


class Controller:
    """What a training loop holds. Subclassing is optional: any class with these four members will do."""

    observes: frozenset[str] = frozenset({"progress"})  # the observations `decide` needs, out of OBSERVATIONS

    def decide(self, observation: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Multipliers per param group name, "*" for every group: `{"*": {"lr": 2.0, "weight_decay": 0.5}}`.

        Finite and above 0; they hold until the next decision. A group's own entry wins over "*", hyperparameter by
        hyperparameter. `observation` holds at least what `observes` names, and is not to be changed.
        """
        raise NotImplementedError

    def state_dict(self) -> dict:
        """The controller's part of the run's state: string keys, JSON values or tensors. Empty if it keeps none."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Continue as the controller that gave `state` would have."""
        if state:
            raise JelError(
                f"{type(self).__name__} keeps no state, but the saved run's controller left some: "
                "resume with the controller that the run began with"
            )


class NullController(Controller):
    """Multiplies by exactly 1: the run is, bit for bit, the run without a controller."""

    observes = frozenset()

    def decide(self, observation: Mapping[str, float]) -> dict[str, dict[str, float]]:
        return copy.deepcopy(IDENTITY)


class PolicyController(Controller):
    """JEL: the mean action of a learned policy at state [t/T], the same for every param group (paper 3).

    `policy`: a `GaussianPolicy`, the path of a saved one, or None for the one shipped with the package. The weights
    are copied, so training the policy further does not change the controller. `history` lists every decision taken,
    as [progress, lr, weight_decay]. Raises `JelError` for a policy that cannot be read, or is not one of progress.
    """

    def __init__(self, policy: GaussianPolicy | str | Path | None = None):
        if not isinstance(policy, GaussianPolicy):
            policy, _ = load_policy(policy or default_policy_path())
        self.weights, self.digest = progress_weights(policy), policy_digest(policy)
        self.history: list[list[float]] = []

    def decide(self, observation: Mapping[str, float]) -> dict[str, dict[str, float]]:
        progress = float(observation["progress"])
        factors = numpy_multipliers(self.weights, progress)
        self.history.append([progress, *factors.values()])
        return {"*": factors}

    def state_dict(self) -> dict:
        return {"policy_sha256": self.digest, "history": [list(row) for row in self.history]}

    def load_state_dict(self, state: dict) -> None:
        if state.get("policy_sha256") != self.digest:
            theirs = str(state.get("policy_sha256"))
            raise JelError(
                f"the saved run was controlled by policy {theirs[:12]}, this is policy {self.digest[:12]}: "
                "resume with the policy that the run began with"
            )
        self.history = [list(row) for row in state["history"]]


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
        from jel.schedule import ScheduleController  # here, because it builds on this module

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
