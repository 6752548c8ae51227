"""From a raw action to what the optimizer reads: raw -> multipliers -> param groups. Pure but for the last write.

Shapes: E episodes, A = len(ACTIONS) actions. Multipliers are named, by param group and by hyperparameter:
`{"*": {"lr": 2.0, "weight_decay": 0.5}, "lm_head": {"lr": 1.0}}`, where "*" stands for every group.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor

from jel.errors import JelError

LARGEST = sys.float_info.max  # an integer may be finite and yet no float

ACTIONS = ("lr", "weight_decay")
IDENTITY = {"*": {name: 1.0 for name in ACTIONS}}

Multipliers = Mapping[str, Mapping[str, "float | Tensor"]]


def scales_from_actions(raw: Tensor, action_range: float) -> Tensor:
    """Multipliers `exp(log(r) * tanh(raw))` (paper 3.3): (..., A) -> (..., A), each in [1/r, r], 1 at raw = 0."""
    return torch.exp(math.log(action_range) * torch.tanh(raw))


def multipliers(scales: Tensor) -> dict[str, float | Tensor]:
    """Name the last axis: (A,) -> a float per action; (E, A) -> a tensor (E,) per action."""
    return {
        name: column if column.ndim else column.item() for name, column in zip(ACTIONS, scales.unbind(-1), strict=True)
    }


def apply_multipliers(
    param_groups: Sequence[dict], base: Sequence[Mapping[str, float | Tensor]], multipliers: Multipliers
) -> None:
    """Write `base value * multiplier` into every param group.

    `base[i]` is what the base schedule gives group i at this step, e.g. `{"lr": 0.02, "weight_decay": 0.1}`. A group's
    own entry wins over "*", hyperparameter by hyperparameter; what neither names is written as the base has it, so the
    identity writes the base bit for bit. A group without a "name" matches only "*". A multiplier is a float, or a
    tensor (E,) when the base values and the loop carry an episode axis.
    Raises `JelError`, before anything is written, for what `validate_multipliers` refuses.
    """
    validate_multipliers(multipliers, [group["name"] for group in param_groups if "name" in group])
    everywhere = multipliers.get("*", {})
    chosen = [{**everywhere, **multipliers.get(group.get("name"), {})} for group in param_groups]
    for values, factors in zip(base, chosen, strict=True):
        if unknown := factors.keys() - values.keys():
            raise JelError(f"multiplier for {_listed(unknown)}, but the base schedule sets only {_listed(values)}")
    for group, values, factors in zip(param_groups, base, chosen, strict=True):
        group.update({key: value * factors.get(key, 1.0) for key, value in values.items()})


def validate_multipliers(multipliers: Multipliers, group_names: Collection[str]) -> None:
    """Raise `JelError` unless every name is "*" or one of `group_names`, and every number finite and positive.

    Tensors pass unread: reading them would make the loop wait for the device.
    """
    if not isinstance(multipliers, Mapping) or not all(isinstance(m, Mapping) for m in multipliers.values()):
        raise JelError(f"multipliers must map group names to {{hyperparameter: number}}, not {multipliers!r}")
    if unknown := multipliers.keys() - {"*", *group_names}:
        raise JelError(f"multipliers for unknown group {_listed(unknown)}; the groups are *, {_listed(group_names)}")
    for group, factors in multipliers.items():
        for key, value in factors.items():
            if not isinstance(value, Tensor) and not (isinstance(value, Real) and 0.0 < value <= LARGEST):
                raise JelError(f"multiplier {group}.{key} is {value!r}; it must be a finite number above 0")


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(set(map(str, names)))) or "(no named groups)"
