"""What a schedule was learned against, and whether an optimizer fits it.

Multipliers learned on a learning rate of 1e-3 say nothing about an optimizer at 0.3. A contract records the kind and
the base values of every param group, the base schedule, and the lengths of run that the schedule is meant for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.optim import Optimizer

from jel.errors import JelError
from jel.hyperparameters import described, group_names, has, initial, kind_of

TOLERANCE = 0.01  # relative, of a base value
LENGTHS = 4.0  # without a stated range, runs from a quarter of the learned length to four times it

CONSTANT = "constant"


@dataclass(frozen=True)
class GroupContract:
    """A param group: its name ("*" for all), what updates it, and the base values, e.g. `{"lr": 1e-3}`."""

    name: str
    kind: str
    base: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Contract:
    """`groups`: empty where any optimizer fits. `schedule`: of the base, "constant", or the name of what gave it.

    `steps`: the run's or episode's length that it was learned on; `least` and `most`: the lengths it is meant for.
    None where it does not matter.
    """

    groups: tuple[GroupContract, ...] = ()
    schedule: str | None = None
    steps: int | None = None
    least: int | None = None
    most: int | None = None

    @classmethod
    def of(
        cls,
        optimizer: Optimizer,
        steps: int,
        schedule: str = CONSTANT,
        least: int | None = None,
        most: int | None = None,
    ) -> Contract:
        """The contract of a schedule that is learned on this optimizer as it stands; groups alike become one "*"."""
        groups = [
            GroupContract(name, kind_of(optimizer, group), described(group))
            for name, group in zip(group_names(optimizer), optimizer.param_groups)
        ]
        if all((g.kind, g.base) == (groups[0].kind, groups[0].base) for g in groups):
            groups = [GroupContract("*", groups[0].kind, groups[0].base)]
        return cls(tuple(groups), schedule, steps, least, most)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "groups": [asdict(group) for group in self.groups]}

    @classmethod
    def from_json(cls, record: Any) -> Contract:
        """The contract that `to_json` described. Raises `JelError` if it is none."""
        try:
            groups = tuple(
                GroupContract(str(g["name"]), str(g["kind"]), {str(k): float(v) for k, v in g["base"].items()})
                for g in record["groups"]
            )
            lengths = [record.get(key) for key in ("steps", "least", "most")]
            if any(n is not None and (type(n) is not int or n < 1) for n in lengths):
                raise ValueError("a length is no number of steps")
            if any(not math.isfinite(v) for g in groups for v in g.base.values()):
                raise ValueError("a base value is not finite")
            schedule = record.get("schedule")
            return cls(groups, None if schedule is None else str(schedule), *lengths)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise JelError(f"its contract is malformed ({type(e).__name__}: {e})") from None

    def misfit(self, optimizer: Optimizer, total_steps: int, base_schedule: str) -> str | None:
        """Why this optimizer, length and base schedule do not fit, in a few words; None if they do."""
        return self._groups_misfit(optimizer) or self._run_misfit(total_steps, base_schedule)

    def _groups_misfit(self, optimizer: Optimizer) -> str | None:
        known = {group.name: group for group in self.groups}
        names = group_names(optimizer)
        for name, group in zip(names, optimizer.param_groups):
            wanted = known.get(name, known.get("*"))
            if not known:
                return None
            if wanted is None:
                return f"it was learned with param groups {', '.join(known)}, and this one is {name}"
            kind = kind_of(optimizer, group)
            if kind != wanted.kind:
                return f"it was learned on {wanted.kind}, and group {name} is trained by {kind}"
            for key, value in wanted.base.items():
                here = float(initial(group, key)) if has(group, key) else math.nan
                if not abs(here - value) <= TOLERANCE * abs(value):
                    return f"it was learned at {key} {value:g}, and group {name} has {here:g}"
        if missing := known.keys() - {"*", *names}:
            return f"it was learned with param groups {', '.join(sorted(missing))}, which this optimizer has not"
        return None

    def _run_misfit(self, total_steps: int, base_schedule: str) -> str | None:
        if self.schedule is not None and self.schedule != base_schedule:
            return f"it was learned over the base schedule {self.schedule}, and here it is {base_schedule}"
        least, most = self.least, self.most
        if self.steps is not None:
            least = math.ceil(self.steps / LENGTHS) if least is None else least
            most = math.floor(self.steps * LENGTHS) if most is None else most
        if not (least or 0) <= total_steps <= (most or math.inf):
            return f"it is meant for {least} to {most} steps, and this run has {total_steps}"
        return None


ANY = Contract()  # of what a person wrote for the run at hand: it fits whatever it is given
