"""How far a learned schedule may go from the user's own optimizer: ranges, and the knobs they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from jel.errors import JelError
from jel.knobs import Knob
from jel.tasks.base import Task

LARGEST_RANGE = 1e6
NAMED = {"good": 10.0, "rough": 100.0, "unknown": 1000.0}


@dataclass(frozen=True)
class Base:
    """Multipliers start at 1 and stay within [1 / range, range]; every range above 1, at most 1e6.

    The default is for a base that is already good. `corrections`: the range of each param group's own correction
    around the shared learning rate; None for no corrections.
    """

    lr: float = NAMED["good"]
    weight_decay: float = 10.0
    corrections: float | None = 3.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name == "corrections":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 < value <= LARGEST_RANGE:
                raise JelError(f"base: the range of {field.name} is {value!r}; it must be above 1, at most 1e6")


def as_base(given: Base | Mapping[str, Any] | str | float | None) -> Base:
    """A `Base` from what a user may write: None, a range of the learning rate, a name, or a dict of ranges."""
    if given is None or isinstance(given, Base):
        return given or Base()
    if isinstance(given, str):
        if given not in NAMED:
            raise JelError(f"base {given!r} is none of {', '.join(NAMED)}; or give the range of the learning rate")
        return Base(lr=NAMED[given])
    if isinstance(given, Mapping):
        known = [field.name for field in fields(Base)]
        if unknown := given.keys() - set(known):
            raise JelError(f"base has unknown {', '.join(map(str, unknown))}; there are {', '.join(known)}")
        return Base(**given)
    return Base(lr=given)


def knobs_for(task: Task, base: Base, most_corrections: int) -> tuple[Knob, ...]:
    """The shared learning rate; weight decay if any group decays; corrections for some groups where there are several.

    The group with most parameters has no correction (the shared multiplier is its own), and of the others the
    `most_corrections` largest have one: each knob more is one more thing to find out at the same price.
    """
    around = lambda most: (1 / most, float(most))
    facts: Sequence[tuple] | None = getattr(task, "facts", None)
    knobs = [Knob("lr", "lr", bounds=around(base.lr))]
    if facts is None or any(fact[2] for fact in facts):
        knobs.append(Knob("weight_decay", "weight_decay", bounds=around(base.weight_decay)))
    if base.corrections is not None and len(task.groups) > 1:
        size = {fact[0]: fact[4] for fact in facts} if facts else dict.fromkeys(task.groups, 1)
        others = sorted(task.groups, key=lambda name: -size[name])[1:]
        knobs += [
            Knob(f"{name}.lr", "lr", (name,), bounds=around(base.corrections)) for name in others[:most_corrections]
        ]
    return tuple(knobs)


def describe_knobs(knobs: Sequence[Knob], task: Task) -> str:
    """One line: what is turned, and how far."""
    parts = [f"{knob.name} x{knob.bounds[0]:.3g} to x{knob.bounds[1]:.3g}" for knob in knobs]
    own = sum("*" not in knob.groups for knob in knobs)
    rest = len(task.groups) - 1 - own
    follow = f"; {rest} other group{'s' * (rest > 1)} follow the shared lr" if own and rest > 0 else ""
    return ", ".join(parts) + follow
