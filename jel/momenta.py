"""What a torch optimizer keeps about its gradients, found by the names in its state.

| kind  | optimizers                          | average of gradients         | compared with eps             |
|-------|-------------------------------------|------------------------------|-------------------------------|
| adam  | Adam, AdamW, NAdam, RAdam, Adamax   | `exp_avg`                    | `exp_avg_sq` or `exp_inf`     |
| inner | `jel.InnerOptimizer`                | `momentum`                   | `denominator`                 |
| sgd   | torch's SGD with momentum           | `momentum_buffer`, a sum     |                               |
| muon  | Muon, of torch or of this project   | `momentum_buffer`, averaging |                               |

An optimizer whose state is not in `optimizer.state` may have a method `param_state(group)`: a dict a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Number = Any  # a float, or a 0-D tensor


class Gains(NamedTuple):
    """What an average keeps at a step and with what weight a gradient enters; `second` is the denominators' keep."""

    keep: Number
    gain: Number
    first_gain: Number
    second: Number = 0.0


def param_states(optimizer: torch.optim.Optimizer, group: dict, params: Sequence[Tensor]) -> list[Mapping[str, Any]]:
    """The optimizer's state of these parameters of a group: an empty mapping where there is none yet."""
    elsewhere = getattr(optimizer, "param_state", None)
    if elsewhere is None:
        return [optimizer.state.get(p, {}) for p in params]
    known = {id(p): state for p, state in zip(group["params"], elsewhere(group), strict=True)}
    return [known[id(p)] for p in params]


def kind_of_state(state: Mapping[str, Any], group: Mapping[str, Any], param: Tensor) -> str | None:
    """A kind of the table above, or None for a state that holds no average of gradients."""

    def holds(name: str) -> bool:
        t = state.get(name)  # of another shape or type: quantised, or something else under this name
        return isinstance(t, Tensor) and t.is_floating_point() and t.shape == param.shape

    if holds("exp_avg") and "betas" in group:
        return "adam"
    if holds("momentum") and "betas" in group:
        return "inner"
    if holds("momentum_buffer") and "momentum" in group and not holds("square_avg"):  # RMSprop's is of updates
        return "sgd" if "dampening" in group else "muon"
    return None


def gains_of(kind: str, group: Mapping[str, Any]) -> Gains:
    """The group's gains at this moment."""
    if kind in ("adam", "inner"):
        keep, second, *_ = group["betas"]  # some have a third
        return Gains(keep, 1 - keep, 1 - keep, second)
    keep = group["momentum"]
    if kind == "sgd":
        return Gains(keep, 1 - group["dampening"], 1.0)  # the first gradient is not dampened
    return Gains(keep, 1 - keep, 1 - keep)


AVERAGE = {"adam": "exp_avg", "inner": "momentum", "sgd": "momentum_buffer", "muon": "momentum_buffer"}


def averages_of(kind: str, states: Sequence[Mapping[str, Any]], params: Sequence[Tensor]) -> list[Tensor]:
    """The averages themselves, not yet divided by the weight they have gathered; zeros where there is none yet."""
    name = AVERAGE[kind]
    return [state[name] if name in state else torch.zeros_like(p) for state, p in zip(states, params)]


def denominators_of(
    kind: str, states: Sequence[Mapping[str, Any]], group: Mapping[str, Any]
) -> tuple[list[Tensor], bool] | None:
    """(denominators, whether they are squares); None where there are none."""
    names = {"adam": ("max_exp_avg_sq", "exp_avg_sq", "exp_inf"), "inner": ("denominator",)}.get(kind, ())
    for name in names:
        if all(isinstance(state.get(name), Tensor) for state in states):
            return [state[name] for state in states], name.endswith("sq") or group.get("denominator") == "rms"
    return None
