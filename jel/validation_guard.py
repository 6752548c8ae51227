"""The best weights on validation are kept: a run that blows up goes back to them, and a run ends with their mean.

```python
guard = jel.ValidationGuard.of(model)     # or ValidationGuard(save=..., load=...)
scheduler = jel.Scheduler(optimizer, total_steps, "lhopt", guard=guard)
...; scheduler.observe(loss=loss, val_loss=...)
guard.load_best(validate)                 # at the end; validate() -> the loaded weights' validation loss
```
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jel.errors import JelError
from jel.guard import Guard

# chosen on the kinds that lhopt was trained on, see docs/lhopt.md
KEEP = 5  # copies of the best weights
WORSE = 0.1  # as far above its first validation loss as a run may lie, as a share of it
RETREATS = 6  # returns to the best weights for that, each at
CUT = 0.25  # times the learning rates
BEFORE_RETREATS = {"first": None, "retreated": 0}  # of a state saved when there were none


def mean_of(copies: Sequence[Any]) -> Any:
    """The mean of floating-point tensors in equal nests of dicts, lists and tuples; of all else, the first copy's."""
    first = copies[0]
    if isinstance(first, Tensor) and first.is_floating_point():
        return torch.stack([x.float() for x in copies]).mean(0).to(first.dtype)
    if isinstance(first, dict):
        return {key: mean_of([x[key] for x in copies]) for key in first}
    if isinstance(first, (list, tuple)):
        return type(first)(mean_of(list(column)) for column in zip(*copies))
    return first


class ValidationGuard(Guard):
    """Needs no curve of a base and leaves no steps to it: what it compares with is the run's own best.

    save, load: `save()` returns a copy of what is to be kept (weights; and the optimizer's state, if a return is to
        find it as it was), `load(copy)` puts it back.
    - `keep`: how many copies are kept, those of the best validation losses. With 1 there is nothing to take a mean of.
    - `worse`, `retreats`, `cut`: a run whose validation loss lies further above the first that it told than `worse`, as
        a share of that, or whose loss is not finite, goes back to its best weights and on, from then at `cut` times its
        learning rates; so often at most. Infinity and 0 switch it off.
    - `every`: optimizer steps between looks at the training loss, which must be finite.
    - `margin`: how far a validation loss may lie above the best so far, as a share of the best. By default any way:
        what was good is kept, and a policy that may try more ends better (docs/lhopt.md).
    - `patience`: how many validation losses in a row must lie above it.

    It trips once, at the margin or where a loss is not finite and no retreat is left: the best copy is loaded and the
    base's values hold to the end, rates as retreats have left them; good weights are still copied. Copies are not part
    of its state: after resuming, the next validation loss is the best again. Where several ranks train one model, tell
    each of them the same losses: the guard goes by what it is told.
    """

    def __init__(
        self,
        save: Callable[[], Any],
        load: Callable[[Any], None],
        margin: float = math.inf,
        patience: int = 2,
        every: int = 10,
        keep: int = KEEP,
        worse: float = WORSE,
        retreats: int = RETREATS,
        cut: float = CUT,
    ):
        super().__init__(margin=margin, patience=patience, every=every)
        if type(keep) is not int or keep < 1:
            raise JelError(f"a guard keeps at least 1 copy of the best weights, not {keep!r}")
        if type(retreats) is not int or retreats < 0:
            raise JelError(f"a guard's retreats are a number of times, 0 or more, not {retreats!r}")
        if not (isinstance(worse, (int, float)) and worse >= 0 and isinstance(cut, (int, float)) and 0 < cut <= 1):
            raise JelError("a guard needs worse of 0 or more, and cut within (0, 1]")
        self.keep, self.worse, self.retreats, self.cut = keep, worse, retreats, cut
        self.snapshot(save, load)

    @classmethod
    def of(cls, model: nn.Module, **limits: Any) -> ValidationGuard:
        """Keeps a model's parameters and buffers; `limits`: the numbers that `ValidationGuard` takes."""
        if not isinstance(model, nn.Module):
            raise JelError(f"ValidationGuard.of takes a torch.nn.Module, not {type(model).__name__}")
        return cls(lambda: copy.deepcopy(model.state_dict()), model.load_state_dict, **limits)

    def start(self, total_steps: int, recorded: Sequence[tuple[float, float]]) -> None:
        super().start(total_steps, recorded)
        self._until = 0
        self._last: float | Tensor = 0.0
        self._kept: list[tuple[float, int, Any]] = []  # (validation loss, step, copy), the best first
        self.first, self.best, self.best_step = math.nan, math.inf, -1  # validation losses
        self._returned = -1  # the step of the last retreat, whose own training loss says nothing new

    def check_length(self) -> None:
        """Every length will do."""

    def check_told(self, step: int, before: int | None = None) -> None:
        """Without losses it watches nothing, which is no error."""

    def observe(self, step: int, loss: float | Tensor) -> None:
        if step > self._returned:
            self._last = loss

    def validated(self, step: int, loss: float | Tensor) -> None:
        """A validation loss after so many steps: a good one is copied, one that lies too far above goes back."""
        value = float(loss)
        if math.isfinite(value) and (len(self._kept) < self.keep or value < self._kept[-1][0]):
            assert self._save is not None
            kept = sorted([*self._kept, (value, step, self._save())], key=lambda one: one[:2])
            self._kept = kept[: self.keep]
            self.best, self.best_step, _ = kept[0]
        if self.tripped is not None:
            return
        if math.isnan(self.first) and math.isfinite(value):
            self.first = value
        far = value > self.best + self.margin * abs(self.best)  # infinity times 0 is no number: nothing lies above it
        self._strikes = self._strikes + 1 if far else 0
        if self._kept and self._strikes >= self.patience:
            self._back(step, f"validation loss {value:.4g}, the best was {self.best:.4g}")
        elif self._kept and not value <= self._limit:
            self._retreat(step, f"validation loss {value:.4g}, the first was {self.first:.4g}", math.isfinite(value))

    def judge(self, step: int, before: int | None = None) -> None:
        if self.tripped is None and self.due(step, before) and not math.isfinite(float(self._last)):
            self._retreat(step, f"training loss {float(self._last):.4g}", finite=False)

    def load_best(self, validate: Callable[[], float] | None = None) -> int | None:
        """Put the best weights back, at the end of a run; the step of the best copy, or None if there is none.

        With `validate`, which returns the validation loss of the weights as loaded, it is the mean of the copies (a
        uniform soup: Wortsman et al., arXiv 2203.05482), unless that validates worse than the second best of them.
        """
        if not self._kept or self._load is None:
            print("jel guard: nothing to load: it was told no finite validation loss in this process", flush=True)
            return None
        if validate is not None and len(self._kept) > 1:
            self._load(mean_of([kept for _, _, kept in self._kept]))
            if float(validate()) <= self._kept[1][0]:
                return self.best_step
        self._load(self._kept[0][2])
        return self.best_step

    def _retreat(self, step: int, why: str, finite: bool) -> None:
        """To the best weights and on, where one is left and they are good; else what is not finite trips the guard."""
        if self._kept and self._kept[0][0] <= self._limit and self.retreated < self.retreats:
            self.retreated, self._returned, self._last, self._strikes = self.retreated + 1, step, 0.0, 0
            self._load(self._kept[0][2])  # type: ignore[misc]
            how = f"back to the weights of step {self.best_step}, rates x {self.cut:g}"
            print(f"jel guard: step {step}: {why}: {how}", flush=True)
        elif not finite:
            self._back(step, why)

    @property
    def _limit(self) -> float:
        """The validation loss above which the run is worse than its start."""
        return math.inf if self.worse == math.inf else self.first + self.worse * abs(self.first)

    def _back(self, step: int, why: str) -> None:
        line = f"jel guard: step {step}: {why}: back to the base"
        if self._kept and (found := self.load_best()) is not None:
            line += f", from the weights of step {found}"
        self.tripped = line
        print(line, flush=True)

    def state_dict(self) -> dict[str, Any]:
        known = lambda x: x if math.isfinite(x) else None
        best = {"first": known(self.first), "best": known(self.best), "best_step": self.best_step}
        return {**super().state_dict(), **best, "retreated": self.retreated}

    def check_state(self, state: Any) -> None:
        super().check_state({**BEFORE_RETREATS, **state} if isinstance(state, dict) else state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = {**BEFORE_RETREATS, **state}
        super().load_state_dict(state)
        self.first = math.nan if state["first"] is None else float(state["first"])
        self.best = math.inf if state["best"] is None else float(state["best"])
        self.best_step, self.retreated, self._kept = int(state["best_step"]), int(state["retreated"]), []
