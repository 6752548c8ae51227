"""Back to the base when the controlled run does worse than the base would have, and to a snapshot of the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from jel.errors import JelError
from jel.power_law import PowerLaw, fit_power_law

LEAST = 8  # comparisons that the measured part of a run must hold for a fit


class Guard:
    """Compares the training loss, as `Scheduler.observe` is told it, with the base's curve.

    - `margin`: how far the run may lie above the base, as a share of the base's loss; to it comes twice
        the noise of a curve that was measured here.
    - `curve`: the base's training loss, `[(step, loss), ...]`. Without one the schedule's own recorded curve is used,
        and where it has none, the first `measure` of the run's steps are left to the base, whose curve is then
        extrapolated by a power law.
    - `smooth`: weight of the old value in the exponential averages of the loss and of the base's.
    - `every`: optimizer steps between comparisons; default: 8 in the first `measure` of the run, at most 10
        steps apart.
    - `patience`: how many in a row must lie above the margin.
    - `save_every`: optimizer steps between snapshots, if `snapshot` says how to make one.

    One that has tripped holds the base's values to the end of the run. Raises `JelError` for numbers without sense.
    """

    cut = 1.0  # what is left of the learning rates after a retreat

    def __init__(
        self,
        margin: float = 0.1,
        curve: Sequence[tuple[float, float]] | None = None,
        measure: float = 0.1,
        smooth: float = 0.9,
        every: int | None = None,
        patience: int = 3,
        save_every: int = 100,
    ):
        counts = patience, save_every, 1 if every is None else every
        if not all(isinstance(x, (int, float)) for x in (margin, measure, smooth, *counts)):
            raise JelError("a guard's margin, measure, smooth, every, patience and save_every are numbers")
        if not (margin > 0 and 0 < measure < 1 and 0 <= smooth < 1 and min(counts) >= 1):
            raise JelError(
                "a guard needs a margin above 0, measure within (0, 1), smooth within [0, 1), and every, patience and "
                "save_every of 1 or more"
            )
        self.margin, self.curve, self.measure, self.smooth = margin, curve, measure, smooth
        self.patience, self.save_every, self._given_every = patience, save_every, every
        self._save: Callable[[], Any] | None = None
        self._load: Callable[[Any], None] | None = None
        self.start(0, [])

    def snapshot(self, save: Callable[[], Any], load: Callable[[Any], None]) -> Guard:
        """What to go back to: `save()` returns a copy of the run's state, `load(copy)` restores it. Returns itself."""
        self._save, self._load = save, load
        return self

    def start(self, total_steps: int, recorded: Sequence[tuple[float, float]]) -> None:
        """Begin a run of T steps; `recorded`: the base's loss over progress, `[(t / T, loss), ...]`, or nothing."""
        self._total = total_steps
        curve = self.curve if self.curve is not None else [(p * total_steps, loss) for p, loss in recorded]
        try:
            self._curve = sorted((float(step), float(loss)) for step, loss in curve)
        except (TypeError, ValueError):
            raise JelError("a guard's curve is a list of (step, loss)") from None
        if not all(math.isfinite(x) for point in self._curve for x in point):
            raise JelError("a guard's curve holds a number that is not finite")
        self._until = 0 if self._curve else math.ceil(self.measure * total_steps)  # the base's own steps
        by_default = min(10, max(1, int(self.measure * total_steps) // LEAST))
        self.every = by_default if self._given_every is None else self._given_every
        self._sum: float | Tensor = 0.0  # of the losses since the last comparison, while the base is measured
        self._steps: list[int] = []  # at which they were
        self._points: list[tuple[float, float]] = []  # (mean step, mean loss)
        self._law: PowerLaw | None = None
        self._loss: float | Tensor = 0.0  # exponential average of the run's loss
        self._base = 0.0  # the same average of the base's, so that both lag alike
        self._weight = 0.0  # of what is in the two, out of 1
        self._strikes = 0
        self._snapshots: list[tuple[int, Any]] = []  # (step, copy), the newest last; not part of the state
        self.tripped: str | None = None  # the line that was printed
        self.retreated = 0  # times that it went back to better weights and on, see jel/validation_guard.py

    def check_length(self) -> None:
        """Raise `JelError` for a run too short to measure its base."""
        if self._until and self._until < LEAST * self.every:
            raise JelError(
                f"the guard would measure the base over {self._until} steps, and a fit needs {LEAST * self.every}: "
                "give it the base's curve, a larger measure, or a smaller every"
            )

    # -------------------------------------------------------------------------
    # what the scheduler calls

    @property
    def rates_left(self) -> float:
        """What all retreats together have left of the learning rates."""
        return self.cut**self.retreated

    def observe(self, step: int, loss: float | Tensor) -> None:
        """The training loss of step number `step`, from 1; a tensor stays on its device."""
        if step <= self._until:
            self._sum, self._steps = self._sum + loss, [*self._steps, step]
        elif self.tripped is None:
            self._loss = self.smooth * self._loss + (1 - self.smooth) * loss
            self._base = self.smooth * self._base + (1 - self.smooth) * self._base_at(step)
            self._weight = self.smooth * self._weight + (1 - self.smooth)

    def validated(self, step: int, loss: float | Tensor) -> None:
        """The validation loss after so many steps, which this guard does not look at (jel/validation_guard.py does)."""

    def holds_base(self, step: int) -> bool:
        """Whether the base's values hold at this step."""
        return self.tripped is not None or step < self._until

    def due(self, step: int, before: int | None = None) -> bool:
        """Whether a multiple of `every` lies in (before, step]. `before`: the step at the last call, by default the one
        before.
        """
        return step // self.every > (step - 1 if before is None else before) // self.every

    def check_told(self, step: int, before: int | None = None) -> None:
        """Raise `JelError` where a comparison is due and no loss was given."""
        if self.tripped is None and self.due(step, before) and not (self._weight or self._steps):
            raise JelError("the guard was not told a loss: call observe(loss=...) at every step")

    def judge(self, step: int, before: int | None = None) -> None:
        """Compare, and go back where it must: after `step` optimizer steps; `before` as in `due`."""
        if self.tripped is not None or not self.due(step, before):
            return
        if self._steps:
            self._measured()
        if not self._weight:
            return
        loss, base = float(self._loss) / self._weight, self._base / self._weight
        bad = not loss <= base + self.margin * abs(base) + self._noise
        self._strikes = self._strikes + 1 if bad else 0
        if self._strikes >= self.patience or not math.isfinite(loss):
            self._trip(step, loss, base)
        elif not bad and self._save is not None and step // self.save_every > self._newest // self.save_every:
            self._snapshots = [*self._snapshots[-1:], (step, self._save())]

    def go_back(self, before: int) -> int:
        """Load the newest snapshot of a step up to `before`, else the oldest; its step. `JelError` if there is none."""
        if self._load is None or not self._snapshots:
            raise JelError("the controller asks to go back, and there is no snapshot: see Guard.snapshot")
        step, copy = next((s for s in reversed(self._snapshots) if s[0] <= before), self._snapshots[0])
        self._load(copy)
        return step

    # -------------------------------------------------------------------------
    # inside

    def _measured(self) -> None:
        point = sum(self._steps) / len(self._steps), float(self._sum) / len(self._steps)
        self._sum, self._steps = 0.0, []
        if math.isfinite(point[1]):
            self._points = [*self._points, point]

    def _base_at(self, step: int) -> float:
        if self._curve:
            steps, losses = zip(*self._curve)
            return float(np.interp(step, steps, losses))
        if self._law is None:
            if self._steps:
                self._measured()
            if len(self._points) < 3:
                return math.inf  # the base itself was not finite: nothing to compare with
            self._law = fit_power_law(*zip(*self._points))
        return self._law.at(step)

    @property
    def _noise(self) -> float:
        """Twice the spread of the measured points around their curve, which the margin leaves room for."""
        if self._law is None:
            return 0.0
        return 2 * math.sqrt(sum((self._law.at(t) - loss) ** 2 for t, loss in self._points) / len(self._points))

    @property
    def _newest(self) -> int:
        """The step of the newest snapshot, 0 before the first."""
        return self._snapshots[-1][0] if self._snapshots else 0

    def _trip(self, step: int, loss: float, base: float) -> None:
        how = "recorded" if self._curve else "extrapolated"
        line = f"jel guard: step {step}: loss {loss:.4g}, the base's is {base:.4g} ({how}, margin {self.margin:.0%})"
        line += ": back to the base"
        if self._load is not None and self._snapshots:
            line += f", from the snapshot of step {self.go_back(step)}"
        self.tripped = line
        print(line, flush=True)

    # -------------------------------------------------------------------------
    # state

    def state_dict(self) -> dict[str, Any]:
        """Numbers, and the line that was printed. Snapshots are the caller's, and not in it."""
        return {
            "sum": float(self._sum),
            "steps": list(self._steps),
            "points": [list(point) for point in self._points],
            "law": list(astuple(self._law)) if self._law else None,
            "averages": [float(self._loss), self._base, self._weight],
            "strikes": self._strikes,
            "tripped": self.tripped,
        }

    def check_state(self, state: Any) -> None:
        """Raise `JelError` unless `load_state_dict` takes it: the state of a guard of this kind."""
        if not isinstance(state, dict) or state.keys() != self.state_dict().keys():
            raise JelError(f"the saved run had another kind of guard than {type(self).__name__}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the guard that gave the state would have."""
        self._sum, self._steps = float(state["sum"]), [int(step) for step in state["steps"]]
        self._points = [(float(step), float(loss)) for step, loss in state["points"]]
        self._law = PowerLaw(*map(float, state["law"])) if state["law"] is not None else None
        self._loss, self._base, self._weight = map(float, state["averages"])
        self._strikes, self.tripped = int(state["strikes"]), state["tripped"]


def forget_broken(optimizer: Optimizer) -> None:
    """Empty the optimizer's state of every parameter for which it holds a number that is not finite."""
    for state in optimizer.state.values():
        tensors = [t for t in state.values() if isinstance(t, Tensor) and t.is_floating_point()]
        if not all(bool(t.isfinite().all()) for t in tensors):
            state.clear()
