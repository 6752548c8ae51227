"""Surviving a divergence: what counts as one, what is to blame, and how much more carefully to go on.

A loss is a spike if it is not finite, or far above the recent losses in units of their own spread; no threshold is
absolute. Then either the batch is to blame (the weights still do well on the last good one): its update is skipped. Or
the weights are: the run goes back to an older checkpoint, and the learning-rate multipliers are capped from then on.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from statistics import median

from nanochat.common import UserError

WINDOW = 50  # recent losses that a new one is compared with
WARMUP = 10  # ... and as many must have been seen before their spread means anything
THRESHOLD = 12.0  # spreads above the recent median; assumption: undisturbed runs at smoke and tiny stayed below 4.1
FLOOR = 0.05  # ... and this share of it: large batches are so even that a change of topic would pass 12 spreads
SURGE = 2.0  # before that, a loss this many times the highest of 3 or more (a first step may well double the loss)
REACH = 5  # a checkpoint so many steps old does not hold the damage yet: it shows within a few steps


class Verdict(enum.Enum):
    """What is to become of a step's update."""

    TAKE = "take it"
    SKIP = "leave it out, as decided before"
    SKIP_SPIKE = "leave it out: the batch is to blame"
    GO_BACK = "go back: the weights are to blame"


class DivergenceGuard:
    """Watches the losses of a run and keeps what was learnt from its spikes.

    `max_tries`: recoveries before the run is given up; with 0 a finite loss is no spike. Identical on all ranks
    if the losses are.
    """

    def __init__(self, max_tries: int):
        self.max_tries, self.tries = max_tries, 0
        self.recent: list[float] = []
        self.lr_cap = math.inf  # on every learning-rate multiplier
        self.skipped: list[int] = []  # steps whose update is left out
        self._accepted = -1  # the last step whose loss was no spike
        self._cut_at, self._cuts = -math.inf, 0  # the last step that led to a cut, and the cuts in a row before it

    def is_spike(self, loss: float) -> bool:
        """Whether this loss means trouble, by the losses accepted so far."""
        return not math.isfinite(loss) or loss > self.spike_limit()

    def spike_limit(self) -> float:
        """A finite loss above this is a spike."""
        if self.max_tries == 0 or len(self.recent) < 3:
            return math.inf
        highest = max(self.recent)
        if len(self.recent) < WARMUP:
            return SURGE * highest
        middle = median(self.recent)
        spread = 1.4826 * median(abs(x - middle) for x in self.recent)  # the standard deviation, were they Gaussian
        return max(highest, middle + max(THRESHOLD * spread, FLOOR * middle))

    def accept(self, step: int, loss: float) -> None:
        """Take the loss of `step` into the history."""
        self.recent, self._accepted = [*self.recent[1 - WINDOW :], loss], step

    def judge(self, step: int, loss: float, loss_of: Callable[[int], float]) -> Verdict:
        """What is to become of the update of `step`, whose loss is `loss`; counts a new spike as a recovery.

        `loss_of(step)`: the loss of that step's batch under the present weights. Raises `UserError` at a spike that is
        one too many.
        """
        if step in self.skipped:
            return Verdict.SKIP
        if not self.is_spike(loss):
            self.accept(step, loss)
            return Verdict.TAKE
        self.count(
            f"the run diverged at step {step} (loss {loss:.4g})", "lower the learning rates, or look at the data"
        )
        # the last step accepted, or the next one if none was: its batch tells whether the weights are sound
        witness = self._accepted if self._accepted >= 0 else step + 1
        if self.is_spike(loss_of(witness)):
            return Verdict.GO_BACK
        self.skipped.append(step)
        return Verdict.SKIP_SPIKE

    def skip_line(self, step: int, loss: float) -> str:
        """The line to print about `Verdict.SKIP_SPIKE`."""
        spike = f"step {step}: loss {loss:.4g} is a spike"
        return f"{spike}, but the weights do well on the last good batch: its update is skipped"

    def count(self, what: str, advice: str) -> None:
        """One recovery more. Raises `UserError`, saying `what` happened, and `advice`, if it is one too many."""
        self.tries += 1
        if self.tries > self.max_tries:
            tried = f"after {self.max_tries} recoveries" if self.max_tries else "and --max-recoveries is 0"
            raise UserError(f"{what} {tried}; {advice}")

    def reach(self, step: int) -> int:
        """The newest step to go back to from a spike at `step`: earlier and earlier if the spikes keep coming."""
        return max(0, step - REACH * 2 ** self._in_a_row(step))

    def cut(self, step: int, loss: float, now: dict, before: dict) -> str:
        """The weights are to blame: cap the learning-rate multipliers at half of `now`, those of the last update.

        If spikes keep coming, at a quarter of that, a sixteenth ..., and at what they were `before`, at the checkpoint
        that the run goes back to ({}: not known). One that comes back at the very same step has the update before it
        skipped too: its batch may break the weights at any rate. Returns the line to print.
        """
        if step == self._cut_at and step > 0:
            self.skipped.append(step - 1)
        self._cut_at, self._cuts = step, self._in_a_row(step)
        self.lr_cap = min(self.lr_cap, _highest_lr(now)) * 0.5**2**self._cuts
        if self._cuts and before:
            self.lr_cap = min(self.lr_cap, _highest_lr(before))
        return (
            f"step {step}: loss {loss:.4g} is a divergence: learning-rate multipliers are capped at {self.lr_cap:.3g}"
        )

    def limit(self, multipliers: dict) -> dict:
        """The multipliers under the cap; the very same object while there is none."""
        if self.lr_cap == math.inf:
            return multipliers
        everywhere = {"lr": 1.0, **multipliers.get("*", {})}
        return {
            group: {k: min(v, self.lr_cap) if k == "lr" else v for k, v in own.items()}
            for group, own in {**multipliers, "*": everywhere}.items()
        }

    def state_dict(self) -> dict:
        return {
            "tries": self.tries,
            "recent": self.recent,
            "accepted": self._accepted,
            "lr_cap": self.lr_cap,
            "skipped": self.skipped,
            "cut_at": self._cut_at,
            "cuts": self._cuts,
        }

    def load_state_dict(self, state: dict) -> None:
        """All of it, on resume."""
        self.tries, self._cuts = int(state["tries"]), int(state["cuts"])
        self.lr_cap, self._cut_at = float(state["lr_cap"]), float(state["cut_at"])
        self.skipped = [int(step) for step in state["skipped"]]
        self.rewind(state)

    def rewind(self, state: dict) -> None:
        """Only the history of losses, on going back to an older checkpoint: what was learnt since stays."""
        self.recent, self._accepted = [float(loss) for loss in state["recent"]], int(state["accepted"])

    def _in_a_row(self, step: int) -> int:
        """How many cuts preceded one at `step` without a whole window of good steps between them."""
        return self._cuts + 1 if step <= self._cut_at + WINDOW else 0


def _highest_lr(multipliers: dict) -> float:
    return max((own["lr"] for own in multipliers.values() if "lr" in own), default=1.0)
