"""From what a controller decides to the multiplier of every param group: checked, bounded, limited. Pure functions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from jel.errors import JelError
from jel.hyperparameters import has, live, target
from jel.knobs import Knob, Multipliers, multipliers_of_group, validate_multipliers
from jel.schedule import bounds_of

BOUNDS = (0.01, 100.0)  # of a multiplier, where neither the schedule nor the user says
MAX_CHANGE = 10.0  # by this factor at most from one decision to the next

Held = list[dict[str, float]]  # of each param group, by hyperparameter


def multipliers_of_groups(multipliers: Multipliers, names: Sequence[str], groups: Sequence[Mapping[str, Any]]) -> Held:
    """What holds for each group: its own entries over those of "*", which passes over what a group does not have.

    Raises `JelError` for a group that is not there, a hyperparameter that no group has (or a group named for it), two
    names for one hyperparameter, groups that share a tensor and are to differ, and numbers that are not finite and
    above 0.
    """
    validate_multipliers(multipliers, names)
    for key, value in multipliers.get("*", {}).items():
        if value != 1.0 and not any(has(group, key) for group in groups):
            raise JelError(f"the schedule sets {key}, which no param group of this optimizer has")
    held: Held = []
    for name, group in zip(names, groups):
        if missing := [key for key in multipliers.get(name, {}) if not has(group, key)]:
            raise JelError(
                f"the schedule sets {missing[0]} of group {name}, which this optimizer's group does not have"
            )
        own = {k: float(v) for k, v in multipliers_of_group(multipliers, name).items() if has(group, k)}
        if len({target(group, key) for key in own}) < len(own):
            raise JelError(f"the schedule sets one hyperparameter of group {name} under two names: {', '.join(own)}")
        held.append(own)
    for i, j in itertools.combinations(range(len(groups)), 2):
        for key in (k for k in held[i].keys() | held[j].keys() if has(groups[i], k) and has(groups[j], k)):
            tensor = live(groups[i], key)
            shared = isinstance(tensor, Tensor) and tensor is live(groups[j], key)
            if shared and held[i].get(key, 1.0) != held[j].get(key, 1.0):
                raise JelError(
                    f"groups {names[i]} and {names[j]} share one tensor as their {key}, so they cannot be set apart: "
                    "give each group a tensor of its own"
                )
    return held


def with_rates(held: Held, factor: float) -> Held:
    """Those multipliers, of learning rates `factor` times as large."""
    return held if factor == 1 else [{**own, "lr": own.get("lr", 1.0) * factor} for own in held]


def bounded(
    wanted: Held,
    before: Held | None,
    names: Sequence[str],
    knobs: Sequence[Knob],
    bounds: Mapping[str, tuple[float, float]] | tuple[float, float] | None = None,
    max_change: float = MAX_CHANGE,
) -> Held:
    """`wanted` within the user's bounds, else the knobs', and within a factor `max_change` of the decision before.

    `bounds`: one pair for all, or pairs by hyperparameter, in place of the knobs' or of `BOUNDS`. What was not set
    before counts as 1, but the first decision (`before` None) may be any within bounds. What is no longer wanted
    returns to 1.
    """
    found: Held = []
    for i, (name, own) in enumerate(zip(names, wanted)):
        earlier = before[i] if before is not None else None
        keys = own.keys() | (earlier or {}).keys()
        limits = {}
        for key in sorted(keys):
            users = bounds.get(key) if isinstance(bounds, Mapping) else bounds
            low, high = users or bounds_of(knobs, name, key) or BOUNDS
            value = own.get(key, 1.0)
            if not low * (1 - 1e-5) <= value <= high * (1 + 1e-5):  # a learned value may round past its own bound
                value = min(max(value, low), high)
            if earlier is not None:
                last = earlier.get(key, 1.0)
                value = min(max(value, last / max_change), last * max_change)
            limits[key] = value
        found.append(limits)
    return found


def evenly_spaced(decisions: int, total_steps: int) -> list[int]:
    """The steps, 0 first, at which so many decisions fall evenly in a run; fewer where the run has fewer steps."""
    steps = {round(k * total_steps / decisions) for k in range(decisions)}
    return sorted(step for step in steps if step < total_steps)


def check_bounds(bounds: Any) -> None:
    """Raise `JelError` unless it is None, a pair of rising numbers above 0, or pairs by hyperparameter."""
    pairs = list(bounds.values()) if isinstance(bounds, Mapping) else [] if bounds is None else [bounds]
    for pair in pairs:
        try:
            low, high = pair
            good = 0 < low <= high
        except (TypeError, ValueError):
            good = False
        if not good:
            raise JelError(f"bounds are {bounds!r}; give (low, high) above 0, or a dict of them by hyperparameter")


def check_bound_names(
    bounds: Mapping[str, Any], wanted: Held, names: Sequence[str], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Raise `JelError` for bounds that hold nothing: of what no group has, or what `wanted` sets by another name."""
    for name in bounds:
        if not any(has(group, name) for group in groups):
            raise JelError(f"bounds= has {name}, which no param group of this optimizer has")
        for label, group, own in zip(names, groups, wanted):
            for key in own.keys() - bounds.keys():
                if has(group, name) and target(group, key) == target(group, name):
                    raise JelError(f"bounds= has {name}, which is set as {key} of group {label}: bound that")
