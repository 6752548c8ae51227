"""Reading the saved state of a `jel.Scheduler`: all of it is checked before any of it is used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jel.errors import JelError
from jel.hyperparameters import has

NUMBERS = ("last_epoch", "taken", "step_count", "decided_at")
PARTS = ("controller", "inner", "guard")  # of which each reads its own
NEEDED = {"total_steps", "multipliers", "observed", "base", "decided", *NUMBERS, *PARTS}


def read_state(
    state: Any, version: int, schedule: str, total_steps: int, names: list[str], groups: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The state with numbers that are numbers. `schedule`: its id; `names`: of the param groups.

    Raises `JelError` in one line for a state of another schedule, length or set of groups, and for one that is broken.
    """
    if not isinstance(state, dict) or state.get("version") != version or "schedule" not in state:
        raise JelError("this is not the state of a jel.Scheduler")
    if state["schedule"] != schedule:
        raise JelError("the saved run followed another schedule: resume with the schedule that it began with")
    if missing := NEEDED - state.keys():
        raise JelError(f"the saved state is malformed (no {', '.join(sorted(missing))})")
    if state["total_steps"] != total_steps:
        raise JelError(f"the saved run has total_steps {state['total_steps']}, this scheduler {total_steps}")
    if len(state["multipliers"]) != len(names):
        raise JelError(f"the saved run has {len(state['multipliers'])} param groups, this one {len(names)}")
    if (saved := state.get("groups", names)) != names:
        raise JelError(f"the saved run has the param groups {', '.join(saved)}, this one {', '.join(names)}")
    try:
        read: dict[str, Any] = {key: int(state[key]) for key in NUMBERS} | {key: state[key] for key in PARTS}
        read["multipliers"] = _held(state["multipliers"])
        read["decided"] = [(int(step), _held(held)) for step, held in state["decided"]]
        read["base"] = _held(state["base"])
        read["observed"] = {str(name): float(value) for name, value in state["observed"].items()}
        for held in (read["base"], read["multipliers"]):
            if len(held) != len(groups) or not all(has(g, name) for g, own in zip(groups, held) for name in own):
                raise ValueError("values of other groups")
        if not all(0 < m < math.inf for own in read["multipliers"] for m in own.values()):
            raise ValueError("a multiplier that is not finite and above 0")
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise JelError(f"the saved state is malformed ({type(e).__name__}: {e})") from None
    return read


def _held(groups: Any) -> list[dict[str, float]]:
    """A number for each hyperparameter of each param group."""
    return [{str(name): float(value) for name, value in own.items()} for own in groups]
