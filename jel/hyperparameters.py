"""Hyperparameters of a torch optimizer's param groups, read and written by name.

`lr`, `weight_decay`, `eps` and whatever else a group holds as a number go by their key. `beta1`, `beta2` and
`momentum` are found where the optimizer keeps them: under that key, or in `betas`. With the prefix `1-`, as in
`1-beta1`, a multiplier acts on the distance from 1. A value held as a tensor is filled, never replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from jel.errors import JelError

Value = float | Tensor  # a tensor has no dimensions, or that of episodes side by side

FROM_ONE = "1-"
MOMENTA = {"beta1": 0, "momentum": 0, "beta2": 1}  # the place in `betas`
HIGHEST_MOMENTUM = 0.9999  # what a multiplier may raise a momentum to; a base above it stays
DESCRIBED = ("lr", "weight_decay", "beta1", "beta2", "momentum")  # base values that a contract records


def unwrapped(optimizer: Any) -> Optimizer:
    """The torch optimizer inside a wrapper such as Accelerate's. Raises `JelError` for what is no optimizer."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise JelError(f"{type(optimizer).__name__} is no torch optimizer")
    return optimizer


def group_names(optimizer: Optimizer) -> list[str]:
    """Each param group's "name", or its index for a group without one."""
    return [str(group.get("name", i)) for i, group in enumerate(optimizer.param_groups)]


def kind_of(optimizer: Optimizer, group: Mapping[str, Any]) -> str:
    """What updates this group, in lower case: the group's own "kind" where it has one, else the optimizer's class."""
    return str(group.get("kind", type(optimizer).__name__)).lower()


def target(group: Mapping[str, Any], name: str) -> tuple[str, int | None] | None:
    """(key, index into it or None) of a hyperparameter; None for one that this group does not have.

    Two names with one target are one hyperparameter.
    """
    name = name.removeprefix(FROM_ONE)
    value = group.get(name)
    if isinstance(value, (Real, Tensor)) and not isinstance(value, bool):
        return name, None
    betas = group.get("betas")
    if name in MOMENTA and isinstance(betas, (tuple, list)) and len(betas) > MOMENTA[name]:
        return "betas", MOMENTA[name]
    return None


def has(group: Mapping[str, Any], name: str) -> bool:
    return name.removeprefix(FROM_ONE) != "params" and target(group, name) is not None


def described(group: Mapping[str, Any]) -> dict[str, float]:
    """The base values by which a contract knows a group, each under one name."""
    found: dict[tuple[str, int | None], str] = {}
    for name in DESCRIBED:
        place = target(group, name)
        if place is not None:
            found.setdefault(place, name)
    return {name: float(initial(group, name)) for name in found.values()}


def live(group: Mapping[str, Any], name: str) -> Value:
    """The value that the group holds, itself: a tensor is not copied. Raises `KeyError` where there is none."""
    place = target(group, name)
    if place is None:
        raise KeyError(name)
    key, index = place
    return group[key] if index is None else group[key][index]


def initial(group: Mapping[str, Any], name: str) -> Value:
    """The base value: `initial_<key>` as torch's schedulers leave it for `lr`, else what the group holds; a copy."""
    key = name.removeprefix(FROM_ONE)
    for candidate in (f"initial_{key}", *(["initial_wd"] if key == "weight_decay" else [])):
        if candidate in group:
            return copied(group[candidate])
    return copied(live(group, name))


def copied(value: Value) -> Value:
    return value.detach().clone() if isinstance(value, Tensor) else value


def scaled(name: str, base: Value, multiplier: Value) -> Value:
    """base * multiplier, or 1 - (1 - base) * multiplier under the prefix `1-`; a momentum stays in [0, 0.9999].

    A multiplier of 1.0 gives the base itself, bit for bit. A multiplier for episodes side by side is a tensor (E,).
    """
    if not isinstance(multiplier, Tensor) and multiplier == 1.0:
        return base
    product = 1 - (1 - base) * multiplier if name.startswith(FROM_ONE) else base * multiplier
    if name.removeprefix(FROM_ONE) not in MOMENTA:
        return product
    if isinstance(base, Tensor):
        return torch.as_tensor(product).clamp(min=0.0).minimum(base.clamp(min=HIGHEST_MOMENTUM))
    highest = max(base, HIGHEST_MOMENTUM)
    return product.clamp(0.0, highest) if isinstance(product, Tensor) else min(max(product, 0.0), highest)


def unscaled(name: str, product: Value, multiplier: float) -> Value:
    """The base whose `scaled` is `product`."""
    if multiplier == 1.0:
        return copied(product)
    return 1 - (1 - product) / multiplier if name.startswith(FROM_ONE) else product / multiplier


def write(group: dict[str, Any], name: str, value: Value) -> None:
    """Set a hyperparameter that the group has. A tensor is filled in place, unless the new value has other axes."""
    place = target(group, name)
    if place is None:
        raise KeyError(name)
    key, index = place
    held = group[key] if index is None else group[key][index]
    if isinstance(held, Tensor) and (not isinstance(value, Tensor) or held.shape == value.shape):
        held.copy_(value) if isinstance(value, Tensor) else held.fill_(value)
    elif index is None:
        group[key] = value
    else:
        group[key] = type(group[key])(value if i == index else x for i, x in enumerate(group[key]))
