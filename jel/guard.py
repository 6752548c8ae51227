"""Back to the base when the controlled run does worse than the base would have, and to a snapshot of the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
from torch import Tensor

from jel.errors import JelError
from jel.power_law import PowerLaw, fit_power_law

POINTS = 64  # of the base's curve that are kept for the fit
LEAST = 8  # comparisons that the measured part of a run must hold for a fit


class Guard:
    """Compares the training loss, as `Scheduler.observe` is told it, with the base's curve.

    margin: how far the run may lie above the base, as a share of the base's loss.
    curve: the base's training loss, `[(step, loss), ...]`. Without one the schedule's own recorded curve is used, and
        where it has none, the first `measure` of the run's steps are left to the base, whose curve is extrapolated from
        them by a power law.
    smooth: weight of the old value in the exponential average of the loss.
    every: optimizer steps between comparisons. `patience`: how many in a row must lie above the margin.
    save_every: optimizer steps between snapshots, if `snapshot` says how to make one.

    One that has tripped holds the base's values to the end of the run. Raises `JelError` for numbers without sense.
    """

    def __init__(
        self,
        margin: float = 0.1,
        curve: Sequence[tuple[float, float]] | None = None,
        measure: float = 0.1,
        smooth: float = 0.9,
        every: int = 10,
        patience: int = 3,
        save_every: int = 100,
    ):
        if not (margin > 0 and 0 < measure < 1 and 0 <= smooth < 1 and min(every, patience, save_every) >= 1):
            raise JelError(
                "a guard needs a margin above 0, measure within (0, 1), smooth within [0, 1), and every, patience and "
                "save_every of 1 or more"
            )
        self.margin, self.curve, self.measure, self.smooth = margin, curve, measure, smooth
        self.every, self.patience, self.save_every = every, patience, save_every
        self._save: Callable[[], Any] | None = None
        self._load: Callable[[Any], None] | None = None
        self._snapshots: list[tuple[int, Any]] = []  # (step, copy), the newest last; not part of the state
        self.start(0, [])

    def snapshot(self, save: Callable[[], Any], load: Callable[[Any], None]) -> Guard:
        """What to go back to: `save()` returns a copy of the run's state, `load(copy)` restores it. Returns itself."""
        self._save, self._load = save, load
        return self

    def start(self, total_steps: int, recorded: Sequence[tuple[float, float]]) -> None:
        """Begin a run of T steps; `recorded`: the base's loss over progress, `[(t / T, loss), ...]`, or nothing."""
        self._total = total_steps
        curve = self.curve if self.curve is not None else [(p * total_steps, loss) for p, loss in recorded]
        self._curve = sorted((float(step), float(loss)) for step, loss in curve)
        self._until = 0 if self._curve else math.ceil(self.measure * total_steps)  # the base's own steps
        self._average: float | Tensor = 0.0
        self._weight = 0.0  # of the losses in the average, out of 1
        self._points: list[tuple[float, float]] = []
        self._law: PowerLaw | None = None
        self._strikes = 0
        self.tripped: str | None = None  # the line that was printed

    def check_length(self) -> None:
        """Raise `JelError` for a run too short to measure its base."""
        if self._until and self._until < LEAST * self.every:
            raise JelError(
                f"the guard would measure the base over {self._until} steps, and a fit needs {LEAST * self.every}: "
                "give it the base's curve, a larger measure, or a smaller every"
            )

    # -------------------------------------------------------------------------
    # what the scheduler calls

    def observe(self, loss: float | Tensor) -> None:
        """The training loss of a step; a tensor stays on its device."""
        self._average = self.smooth * self._average + (1 - self.smooth) * loss
        self._weight = self.smooth * self._weight + (1 - self.smooth)

    def holds_base(self, step: int) -> bool:
        """Whether the base's values hold at this step."""
        return self.tripped is not None or step < self._until

    def check_told(self, step: int) -> None:
        """Raise `JelError` where a comparison is due and no loss was given."""
        if self.tripped is None and step and step % self.every == 0 and not self._weight:
            raise JelError("the guard was not told a loss: call observe(loss=...) at every step")

    def judge(self, step: int) -> None:
        """Compare, and go back where it must: after `step` optimizer steps."""
        if self.tripped is not None or not step or step % self.every:
            return
        loss = float(self._average) / self._weight
        if step <= self._until:
            self._measure(step, loss)
            return
        base = self._base_at(step)
        bad = not loss <= base + self.margin * abs(base)
        self._strikes = self._strikes + 1 if bad else 0
        if self._strikes >= self.patience or not math.isfinite(loss):
            self._trip(step, loss, base)
        elif not bad and self._save is not None and step % self.save_every < self.every:
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

    def _measure(self, step: int, loss: float) -> None:
        if math.isfinite(loss):
            self._points = [*self._points, (float(step), loss)]
            if len(self._points) > POINTS:
                self._points = self._points[::2]

    def _base_at(self, step: int) -> float:
        if self._curve:
            steps, losses = zip(*self._curve)
            return float(np.interp(step, steps, losses))
        if self._law is None:
            if len(self._points) < 3:
                return math.inf  # the base itself was not finite: nothing to compare with
            self._law = fit_power_law(*zip(*self._points))
        return self._law.at(step)

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
            "average": float(self._average),
            "weight": self._weight,
            "points": [list(point) for point in self._points],
            "law": list(astuple(self._law)) if self._law else None,
            "strikes": self._strikes,
            "tripped": self.tripped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the guard that gave the state would have."""
        self._average, self._weight = float(state["average"]), float(state["weight"])
        self._points = [(float(step), float(loss)) for step, loss in state["points"]]
        self._law = PowerLaw(*map(float, state["law"])) if state["law"] is not None else None
        self._strikes, self.tripped = int(state["strikes"]), state["tripped"]
