"""Schedules written by hand. They fit any optimizer: who writes one knows what it is for."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from jel.contract import ANY
from jel.errors import JelError
from jel.schedule import make_schedule


def constant(multiplier: float, hyperparameter: str = "lr", group: str = "*") -> dict[str, Any]:
    """One multiplier, held for the whole run. Raises `JelError` unless it is finite and above 0."""
    return piecewise([(0.0, {group: {hyperparameter: multiplier}})])


def piecewise(rows: Sequence[tuple[float, float | Mapping[str, Mapping[str, float]]]]) -> dict[str, Any]:
    """`(progress, multipliers)` rows, each held until the next: `[(0.0, {"*": {"lr": 2.0}}), (0.5, ...)]`.

    A number for the multipliers is that of every group's learning rate: `[(0.0, 2.0), (0.5, 1.0)]`.

    Raises `JelError` unless progress starts at 0, rises and stays below 1, and multipliers are finite and above 0.
    """
    whole = lambda m: copy.deepcopy(dict(m)) if isinstance(m, Mapping) else {"*": {"lr": m}}
    try:
        decisions = [{"progress": p, "multipliers": whole(m)} for p, m in rows]
    except (TypeError, ValueError):
        raise JelError("a schedule's rows are (progress, multipliers) each") from None
    return make_schedule(decisions, "written by hand", ANY)
