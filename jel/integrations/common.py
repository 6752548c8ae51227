"""What the integrations share: finding the scheduler inside a framework's wrappers, and naming its multipliers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jel
from jel.errors import JelError
from jel.tracking import flat_record


def scheduler_in(found: Any) -> jel.Scheduler | None:
    """The `jel.Scheduler` that this is, wraps (`.scheduler`), or lists; None if there is none.

    Raises `JelError` for several: a framework's callback would not know which one to tell.
    """
    if isinstance(found, jel.Scheduler):
        return found
    if isinstance(found, Iterable) and not isinstance(found, (str, Mapping)):
        all_found = [one for one in map(scheduler_in, found) if one is not None]
        if len(all_found) > 1:
            raise JelError("there are several jel.Schedulers here; tell each one yourself with its observe()")
        return all_found[0] if all_found else None
    wrapped = getattr(found, "scheduler", None)
    return scheduler_in(wrapped) if wrapped is not None and wrapped is not found else None


def multiplier_values(multipliers: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """`{"jel/<group>/<knob>": multiplier}`, as `jel.tracking` names them."""
    return flat_record({"multipliers": multipliers})
