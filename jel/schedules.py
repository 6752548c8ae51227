"""Schedules written by hand. They fit any optimizer: who writes one knows what it is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jel.contract import ANY
from jel.schedule import make_schedule


def constant(multiplier: float, hyperparameter: str = "lr", group: str = "*") -> dict[str, Any]:
    """One multiplier, held for the whole run. Raises `JelError` unless it is finite and above 0."""
    return piecewise([(0.0, {group: {hyperparameter: multiplier}})])


def piecewise(rows: Sequence[tuple[float, Mapping[str, Mapping[str, float]]]]) -> dict[str, Any]:
    """`(progress, multipliers)` rows, each held until the next: `[(0.0, {"*": {"lr": 2.0}}), (0.5, ...)]`.

    Raises `JelError` unless progress starts at 0, rises and stays below 1, and multipliers are finite and above 0.
    """
    decisions = [{"progress": p, "multipliers": {g: dict(own) for g, own in m.items()}} for p, m in rows]
    return make_schedule(decisions, "written by hand", ANY)
