"""From a raw action to a change of the knobs. Pure functions of tensors, named by an object that knows the knobs.

Shapes: A knobs, `...` any leading axes (none, E episodes, or E x K decisions).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jel.errors import JelError
from jel.knobs import Knob, check_knobs, log_bounds, multipliers_from_values


def log_scale(raw: Tensor, centre: Tensor | float, half_width: Tensor | float) -> Tensor:
    """`exp(centre + half_width * tanh(raw))` (paper 3.3, where centre is 0 and half_width log 100): same shape."""
    return torch.exp(centre + half_width * torch.tanh(raw))


class LogScale:
    """JEL's actions: a raw number a knob, squashed into the knob's bounds on a log scale.

    With bounds [1/r, r] a raw action of 0 is a multiplier of exactly 1. Raises `JelError` for knobs that are not on a
    log scale.
    """

    def __init__(self, knobs: Sequence[Knob]):
        check_knobs(knobs)
        if foreign := [knob.name for knob in knobs if knob.scale != "log"]:
            raise JelError(f"knobs {', '.join(foreign)} are not on a log scale, which these actions move along")
        self.knobs = tuple(knobs)
        self._centre, self._half_width = (t.float() for t in log_bounds(knobs))

    def values(self, raw: Tensor) -> Tensor:
        """Raw actions (..., A) -> the knobs' multipliers (..., A)."""
        return log_scale(raw, self._centre.to(raw.dtype), self._half_width.to(raw.dtype))

    def multipliers(self, raw: Tensor) -> dict[str, dict[str, float | Tensor]]:
        """Raw actions (A,) or (E, A) -> multipliers by group and hyperparameter: floats, or tensors (E,)."""
        values = self.values(raw)
        return multipliers_from_values(self.knobs, values.tolist() if values.ndim == 1 else values.unbind(-1))
