"""What a controller can turn, and the one place where a multiplier meets a param group.

A `Knob` is one number that a controller sets: which hyperparameter of which param groups, on what scale, within what
bounds. Multipliers are named by param group and by hyperparameter, "*" standing for every group:
`{"*": {"lr": 2.0, "weight_decay": 0.5}, "lm_head": {"lr": 1.0}}`. A group's own entry wins over "*".

Shapes: E episodes side by side, A knobs; `...` is nothing or E.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from jel.errors import JelError
from jel.hyperparameters import FROM_ONE, copied, has, scaled, target, write

LARGEST = sys.float_info.max  # an integer may be finite and yet no float
SCALES = ("log", "logit")

Multipliers = Mapping[str, Mapping[str, float | Tensor]]

IDENTITY: Multipliers = {"*": {"lr": 1.0, "weight_decay": 1.0}}


@dataclass(frozen=True)
class Knob:
    """A multiplier on `hyperparameter` of the groups named, or of all ("*",), within `bounds`.

    `scale` says in which units a controller moves it: "log" for what is above 0, "logit" for what lies in (0, 1).
    Raises `JelError` for bounds, a scale or groups that make no sense.
    """

    name: str
    hyperparameter: str
    groups: tuple[str, ...] = ("*",)
    scale: str = "log"
    bounds: tuple[float, float] = (0.01, 100.0)

    def __post_init__(self) -> None:
        listed = isinstance(self.groups, tuple) and isinstance(self.bounds, tuple) and len(self.bounds) == 2
        named = listed and all(isinstance(s, str) and s for s in (self.name, self.hyperparameter, *self.groups))
        if not named or not self.groups or len(set(self.groups)) < len(self.groups):
            raise JelError(f"a knob needs a name, a hyperparameter, groups that differ and two bounds, not {self}")
        if self.scale not in SCALES:
            raise JelError(f"knob {self.name}: scale {self.scale!r} is none of {', '.join(SCALES)}")
        low, high = self.bounds
        most = 1.0 if self.scale == "logit" else LARGEST
        if not all(isinstance(b, Real) and not isinstance(b, bool) for b in self.bounds) or not 0 < low < high <= most:
            raise JelError(f"knob {self.name}: bounds {self.bounds} must rise, from above 0 to at most {most:g}")

    def to_json(self) -> dict:
        return {**asdict(self), "groups": list(self.groups), "bounds": list(self.bounds)}

    @classmethod
    def from_json(cls, record: Mapping) -> Knob:
        """The knob that `to_json` described. Raises `JelError` if it is none."""
        try:
            if not isinstance(record["groups"], list):
                raise TypeError("its groups are no list")
            fields = {**record, "groups": tuple(record["groups"]), "bounds": tuple(map(float, record["bounds"]))}
            return cls(**fields)
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            raise JelError(f"{record!r} describes no knob ({e})") from None


def check_knobs(knobs: Sequence[Knob]) -> None:
    """Raise `JelError` unless there is at least one and no two share a name."""
    names = [knob.name for knob in knobs]
    if not names or len(set(names)) < len(names):
        raise JelError(f"a controller needs knobs with names that differ, not {names}")


def multipliers_from_values(knobs: Sequence[Knob], values: Iterable[float | Tensor]) -> dict[str, dict]:
    """One value a knob -> multipliers by group and hyperparameter.

    Where several knobs reach a hyperparameter of a group their values multiply: knobs with named groups are
    corrections around the knobs of all groups. A value is a float, or a tensor (E,).
    """
    everywhere: dict[str, float | Tensor] = {}
    own: dict[str, dict[str, float | Tensor]] = {}
    for knob, value in zip(knobs, values, strict=True):
        for reached in [everywhere] if "*" in knob.groups else [own.setdefault(g, {}) for g in knob.groups]:
            known = reached.get(knob.hyperparameter)
            reached[knob.hyperparameter] = value if known is None else known * value
    for group in own.values():
        for key in group.keys() & everywhere.keys():
            group[key] = group[key] * everywhere[key]
    return {"*": everywhere, **own}


def multipliers_of_group(multipliers: Multipliers, group: str | None) -> dict[str, float | Tensor]:
    """The multipliers that hold for one group: its own entries over those of "*"."""
    return {**multipliers.get("*", {}), **(multipliers.get(group, {}) if group is not None else {})}


def even_decay(multipliers: Multipliers) -> dict[str, dict[str, float | Tensor]]:
    """The same, with learning rate x weight decay, which is what a step decays, multiplied alike in every group.

    A group with a learning rate of its own is given the weight decay that makes up for it; one whose weight decay is
    set keeps that.
    """
    shared = {**IDENTITY["*"], **multipliers_of_group(multipliers, None)}
    even: dict[str, dict[str, float | Tensor]] = {}
    for group, own in multipliers.items():
        even[group] = dict(own)
        if group != "*" and "lr" in own:
            even[group].setdefault("weight_decay", shared["weight_decay"] * shared["lr"] / own["lr"])
    return even


# -----------------------------------------------------------------------------
# param groups


def apply_multipliers(
    param_groups: Sequence[dict], base: Sequence[Mapping[str, float | Tensor]], multipliers: Multipliers
) -> None:
    """Write `base value * multiplier` into every param group: here a learning rate is multiplied.

    `base[i]` is what the base schedule gives group i at this step, e.g. `{"lr": 0.02, "weight_decay": 0.1}`. What no
    multiplier names is written as the base has it, so the identity writes the base bit for bit. A group without a
    "name" matches only "*". A multiplier is a float, or a tensor (E,) when the loop carries an episode axis; that of
    "1-momentum" acts on the distance of a momentum (or beta1) from 1. A value that the group holds as a tensor is
    filled in place, so that captured graphs and compiled steps see the change.
    Raises `JelError`, before anything is written, for what `validate_multipliers` refuses.
    """
    validate_multipliers(multipliers, [group["name"] for group in param_groups if "name" in group])
    written: list[dict[str, float | Tensor]] = []
    for group, values in zip(param_groups, base, strict=True):
        own = multipliers_of_group(multipliers, group.get("name"))
        base_names = {key: _base_name(group, values, key) for key in own}
        if unknown := {key for key, name in base_names.items() if name is None}:
            raise JelError(f"multiplier for {_listed(unknown)}, but the base schedule sets only {_listed(values)}")
        products = {key: copied(value) for key, value in values.items()}  # a group never holds the base itself
        for key, multiplier in own.items():
            products[base_names[key]] = scaled(key, values[base_names[key]], multiplier)  # type: ignore[index]
        written.append(products)
    for group, products in zip(param_groups, written):
        for key, value in products.items():
            if has(group, key):
                write(group, key, value)
            else:
                group[key] = value


def _base_name(group: Mapping[str, Any], values: Mapping[str, Any], key: str) -> str | None:
    """The base's name of what a multiplier is for: "momentum" is an AdamW group's beta1. None: it has no such thing."""
    name = key.removeprefix(FROM_ONE)
    if name in values:
        return name
    place = target(group, name)
    return next((known for known in values if place is not None and target(group, known) == place), None)


def validate_multipliers(multipliers: Multipliers, group_names: Collection[str]) -> None:
    """Raise `JelError` unless every name is "*" or one of `group_names`, and every number finite and positive.

    Tensors pass unread: reading them would make the loop wait for the device.
    """
    if not isinstance(multipliers, Mapping) or not all(isinstance(m, Mapping) for m in multipliers.values()):
        raise JelError(f"multipliers must map group names to {{hyperparameter: number}}, not {multipliers!r}")
    if unknown := multipliers.keys() - {"*", *group_names}:
        raise JelError(f"multipliers for unknown group {_listed(unknown)}; the groups are *, {_listed(group_names)}")
    for group, own in multipliers.items():
        for key, value in own.items():
            if not isinstance(value, Tensor) and not (isinstance(value, Real) and 0.0 < value <= LARGEST):
                raise JelError(f"multiplier {group}.{key} is {value!r}; it must be a finite number above 0")


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(set(map(str, names)))) or "(no named groups)"


def log_bounds(knobs: Sequence[Knob]) -> tuple[Tensor, Tensor]:
    """Centre and half-width of the knobs' bounds in log space: two (A,)."""
    low = torch.tensor([math.log(knob.bounds[0]) for knob in knobs], dtype=torch.float64)
    high = torch.tensor([math.log(knob.bounds[1]) for knob in knobs], dtype=torch.float64)
    return (low + high) / 2, (high - low) / 2
