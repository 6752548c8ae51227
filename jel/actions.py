"""From a raw action to a change of the knobs. Pure functions of tensors, named by an object that knows the knobs.

Shapes: A knobs, `...` any leading axes (none, E episodes, or E x K decisions).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


# -----------------------------------------------------------------------------
# LHOPT


@dataclass(frozen=True)
class StepKnob:
    """A hyperparameter that moves by steps from where it stands: `steps` are factors, or shifts of the logit.

    `bounds` are the value's own, the hyperparameter's and not a multiplier's. Raises `JelError` for steps that are
    none or are out of order.
    """

    knob: Knob
    steps: tuple[float, ...]

    def __post_init__(self) -> None:
        numbers = all(isinstance(s, (int, float)) and math.isfinite(s) for s in self.steps)
        if len(self.steps) < 2 or not numbers or list(self.steps) != sorted(set(self.steps)):
            raise JelError(f"knob {self.knob.name}: steps {self.steps} must be two or more numbers that rise")
        if self.knob.scale == "log" and self.steps[0] <= 0:
            raise JelError(f"knob {self.knob.name}: steps {self.steps} are factors and must be above 0")

    def to_json(self) -> dict:
        return {**self.knob.to_json(), "steps": list(self.steps)}

    @classmethod
    def from_json(cls, record: Mapping) -> StepKnob:
        """What `to_json` described. Raises `JelError` if it is none."""
        if not isinstance(record, Mapping) or not isinstance(record.get("steps"), list):
            raise JelError(f"{record!r} describes no knob with steps")
        rest = {key: value for key, value in record.items() if key != "steps"}
        return cls(Knob.from_json(rest), tuple(record["steps"]))


class RelativeSteps:
    """LHOPT's actions: a choice a knob, each a step away from the value of the moment. A move is the log of a factor.

    Relative, so that a policy cannot learn a fixed schedule; discrete, so that noise cannot push it far.
    """

    def __init__(self, knobs: Sequence[StepKnob]):
        check_knobs([k.knob for k in knobs])
        self.knobs = tuple(knobs)
        self.sizes = tuple(len(k.steps) for k in knobs)
        low, high = zip(*(k.knob.bounds for k in knobs))
        self._logit = torch.tensor([k.knob.scale == "logit" for k in knobs])
        self._low, self._high = (self._inner(torch.tensor(b, dtype=torch.float64)) for b in (low, high))
        self._moves = torch.full((len(knobs), max(self.sizes)), float("nan"))
        for row, k in zip(self._moves, knobs):
            steps = torch.tensor(k.steps, dtype=torch.float64)
            row[: len(k.steps)] = steps if k.knob.scale == "logit" else steps.log()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(k.knob.name for k in self.knobs)

    def moves(self, choices: Tensor) -> Tensor:
        """Choices (..., A), integers -> moves (..., A): logs of factors, shifts of logits."""
        return self._moves[torch.arange(len(self.knobs)), choices]

    def expected_moves(self, probabilities: Sequence[Tensor]) -> Tensor:
        """The mean move under a distribution a knob, each (..., steps of the knob) -> (..., A)."""
        return torch.stack([p @ self._moves[a, : p.shape[-1]] for a, p in enumerate(probabilities)], dim=-1)

    def apply(self, values: Tensor, moves: Tensor) -> Tensor:
        """Values (..., A) of the hyperparameters -> those after the moves (..., A), within the bounds."""
        inner = self._inner(values.double()) + moves.double()
        return self._outer(torch.minimum(torch.maximum(inner, self._low), self._high)).to(values.dtype)

    def relative(self, values: Tensor, start: Tensor) -> Tensor:
        """How far values (..., A) are from where they started, as a move."""
        return (self._inner(values.double()) - self._inner(start.double())).float()

    def _inner(self, values: Tensor) -> Tensor:
        logs = values.log()
        return torch.where(self._logit, logs - (-values).log1p(), logs) if self._logit.any() else logs

    def _outer(self, inner: Tensor) -> Tensor:
        return torch.where(self._logit, inner.sigmoid(), inner.exp()) if self._logit.any() else inner.exp()


class Restart:
    """Registers that hold a copy of the run, and the actions on them: 0 nothing, then save and load of each.

    A load brings back weights and optimizer state; hyperparameters stay as they are, else the trial taught nothing,
    and the steps taken stay taken. What an empty register gives back is nothing.
    """

    def __init__(self, registers: int):
        if type(registers) is not int or not 0 <= registers <= 8:
            raise JelError(f"registers is {registers!r}; it must be an integer from 0 to 8")
        self.registers = registers

    @property
    def size(self) -> int:
        """How many choices the head has; 0 without registers."""
        return 1 + 2 * self.registers if self.registers else 0

    def saves(self, choices: Tensor, register: int) -> Tensor:
        return choices == 1 + 2 * register

    def loads(self, choices: Tensor, register: int) -> Tensor:
        return choices == 2 + 2 * register
