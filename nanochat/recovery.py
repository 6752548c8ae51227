"""Surviving a divergence: what counts as one, what is to blame, and how much more carefully to go on.

A loss is a spike if it is not finite, or far above the recent losses in units of their own spread; no threshold is
absolute. Then either the batch is to blame (the weights do well on the next batch): its update is skipped. Or the
weights are: the run goes back to an older checkpoint, and the learning-rate multipliers are capped from then on.
"""

from __future__ import annotations

import math
from statistics import median

from nanochat.common import UserError

WINDOW = 50       # recent losses that a new one is compared with
WARMUP = 10       # ... and as many must have been seen before one can be called a spike, unless it is not finite
THRESHOLD = 12.0  # spreads above the recent median; assumption, not studied: training noise stays below 6 here


class DivergenceGuard:
    """Watches the losses of a run and keeps what was learnt from its spikes.

    `max_tries`: spikes that are mended before the run is given up. The same on all ranks if the losses are.
    """

    def __init__(self, max_tries: int):
        self.max_tries, self.tries = max_tries, 0
        self.recent: list[float] = []
        self.lr_cap = math.inf          # on every learning-rate multiplier
        self.skipped: list[int] = []    # steps whose update is left out
        self._harshness, self._last_spike = 0, -1

    def is_spike(self, loss: float) -> bool:
        """Whether this loss means trouble, by the losses accepted so far."""
        if not math.isfinite(loss):
            return True
        if len(self.recent) < WARMUP:
            return False
        middle = median(self.recent)
        spread = 1.4826 * median(abs(x - middle) for x in self.recent)  # the standard deviation, were they Gaussian
        return loss > max(self.recent) and loss - middle > THRESHOLD * spread

    def accept(self, loss: float) -> None:
        """Take a loss into the history."""
        self.recent = [*self.recent[1 - WINDOW:], loss]

    def skip(self, step: int, loss: float) -> str:
        """The batch of `step` is to blame: leave its update out. Returns the line to print; raises if it was one too many."""
        self._count(step, loss)
        self.skipped.append(step)
        return f"step {step}: loss {loss:.4g} is a spike, but the weights do well on the next batch: its update is skipped"

    def cut(self, step: int, loss: float, multipliers: dict) -> str:
        """The weights are to blame: cap the multipliers at a half, then a quarter, a sixteenth ... of what they were.

        A spike that comes back at the very same step also has the update before it skipped: a gradient may be broken
        where its loss is not. Returns the line to print; raises `UserError` if it was one try too many.
        """
        self._count(step, loss)
        if step == self._last_spike and step > 0:
            self.skipped.append(step - 1)
        self._last_spike = step
        highest = max((m["lr"] for m in multipliers.values() if "lr" in m), default=1.0)
        self.lr_cap = min(self.lr_cap, highest) * 0.5 ** 2 ** self._harshness
        self._harshness += 1
        return f"step {step}: loss {loss:.4g} is a divergence: learning-rate multipliers are capped at {self.lr_cap:.3g} from now on"

    def limit(self, multipliers: dict) -> dict:
        """The multipliers under the cap; the very same object while there is none."""
        if self.lr_cap == math.inf:
            return multipliers
        everywhere = {"lr": 1.0, **multipliers.get("*", {})}
        return {group: {k: min(v, self.lr_cap) if k == "lr" else v for k, v in factors.items()}
                for group, factors in {**multipliers, "*": everywhere}.items()}

    def state_dict(self) -> dict:
        return {"tries": self.tries, "recent": self.recent, "lr_cap": self.lr_cap, "skipped": self.skipped,
                "harshness": self._harshness, "last_spike": self._last_spike}

    def load_state_dict(self, state: dict) -> None:
        """All of it, on resume."""
        self.tries, self.lr_cap, self.skipped = state["tries"], state["lr_cap"], list(state["skipped"])
        self._harshness, self._last_spike = state["harshness"], state["last_spike"]
        self.rewind(state)

    def rewind(self, state: dict) -> None:
        """Only the history of losses, on going back to an older checkpoint: what was learnt since stays."""
        self.recent = list(state["recent"])

    def _count(self, step: int, loss: float) -> None:
        self.tries += 1
        if self.tries > self.max_tries:
            tried = f"after {self.max_tries} tries to mend it" if self.max_tries else "and --max-recoveries is 0"
            raise UserError(f"the run diverged at step {step} (loss {loss:.4g}) {tried}; lower the learning rates, or look at the data")
