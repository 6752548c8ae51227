"""A torch learning-rate scheduler around a schedule or a controller, for any optimizer and any param groups.

    scheduler = jel.Scheduler(optimizer, total_steps, schedule)
    for batch in loader:
        ...; optimizer.step(); scheduler.step(); optimizer.zero_grad()

docs/scheduler.md says what it does in loops that warm up, accumulate, clip, compile and resume.
"""

from __future__ import annotations

import math
import warnings
import weakref
from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from jel.base_values import BaseValues, first_rates
from jel.contract import CONSTANT
from jel.controller import Decision, as_decision
from jel.decisions import (
    BOUNDS,
    MAX_CHANGE,
    Held,
    bounded,
    check_bound_names,
    check_bounds,
    multipliers_of_groups,
    with_rates,
)
from jel.errors import JelError
from jel.features import OBSERVATIONS, one_number
from jel.guard import Guard, forget_broken
from jel.hooks import weak_hook
from jel.hyperparameters import copied, group_names, initial, live, unwrapped
from jel.recording import recorded_schedule
from jel.schedule import ScheduleController
from jel.scheduler_state import read_state
from jel.source import Source

VERSION = 1  # of the state dict
GIVEN = frozenset(OBSERVATIONS | {"val_loss"}) - {"progress", "step"}  # what `observe` takes
AT_START = frozenset({"progress", "step", "train_loss", "grad_norm"})  # known, or NaN, before the first step
IDLE = 100  # calls of `step` without an optimizer step before a warning

_attached: weakref.WeakKeyDictionary[Optimizer, weakref.ref[Scheduler]] = weakref.WeakKeyDictionary()


class Scheduler(LRScheduler):
    """Multiplies what the base schedule gives by what a schedule or controller decides.

    - `optimizer`: any torch optimizer, or a wrapper whose `.optimizer` is one.
    - `total_steps`: T, the optimizer steps of the run. `step()` after more of them raises.
    - `schedule_or_controller`: an exported schedule (a dict or a path), a policy's path, a registered name, or a
        controller. There is no default.
    - `inner`: a scheduler of the same optimizer, the base schedule. `step` steps it (and passes on its arguments, as
        `ReduceLROnPlateau` needs, which is stepped only then), and the multipliers act on what it gives. Without one
        the base is `initial_lr`.
    - `mode`: "absolute" applies the multipliers where the schedule's contract fits, and refuses elsewhere; "shape"
        divides them by their largest, so that the base value stays the peak.
    - `base_schedule`: what the contract calls the base schedule; default "constant", or the class of `inner`.
    - `bounds`: (low, high) of every multiplier, or by hyperparameter; default: the schedule's own, else (0.01, 100).
    - `max_change`: the largest factor between a group's multipliers from one decision to the next; default: 10 for a
        controller, any for a schedule, of which all is known and checked here.
    - `interval`: optimizer steps between a controller's decisions; default T / 20. A schedule has decision points.
    - `count`: "optimizer" counts optimizer steps, however often `step` is called; "calls" counts calls of `step`, for
        optimizer steps that Python does not see, as in a captured graph.
    - `guard`: True or a `Guard`: back to the base when the run does worse than it (jel/guard.py).

    Raises `JelError` in one line, before the optimizer is touched.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        schedule_or_controller: Any,
        inner: LRScheduler | None = None,
        *,
        mode: str = "absolute",
        base_schedule: str | None = None,
        bounds: Mapping[str, tuple[float, float]] | tuple[float, float] | None = None,
        max_change: float | None = None,
        interval: int | None = None,
        count: str = "optimizer",
        guard: Guard | bool = False,
    ):
        optimizer = unwrapped(optimizer)
        if type(total_steps) is not int or total_steps < 1:
            raise JelError(f"total_steps is {total_steps!r}; it must be the number of optimizer steps, an int above 0")
        if interval is not None and (type(interval) is not int or interval < 1):
            raise JelError(f"interval is {interval!r}; it must be a number of optimizer steps")
        if count not in ("optimizer", "calls"):
            raise JelError(f"count is {count!r}; it must be 'optimizer' or 'calls'")
        if max_change is not None and not (isinstance(max_change, (int, float)) and max_change > 1):
            raise JelError(f"max_change is {max_change!r}; it must be a factor above 1")
        if not isinstance(guard, (bool, Guard)):
            raise JelError(f"guard is {guard!r}; give True, or a guard such as jel.ValidationGuard.of(model)")
        check_bounds(bounds)
        _check_free(optimizer, inner)
        source = Source(schedule_or_controller, mode, optimizer)
        if base_schedule is None:
            base_schedule = CONSTANT if inner is None else type(inner).__name__
        if mode == "absolute":
            source.check_contract(optimizer, total_steps, base_schedule)

        self.total_steps, self.inner, self.count = total_steps, inner, count
        self._base_schedule = base_schedule
        self.guard = guard if isinstance(guard, Guard) else Guard() if guard else None
        self.optimizer, self.controller, self._source = optimizer, source.controller, source
        known = isinstance(self.controller, ScheduleController)  # all that it will ever ask for
        self._bounds, self._max_change = bounds, max_change or (math.inf if known else MAX_CHANGE)
        self._decision_steps = source.decision_steps(total_steps, interval)
        self._names = group_names(optimizer)
        if len(set(self._names)) < len(self._names):
            raise JelError(f"param groups share a name: {', '.join(self._names)}")
        self._observed: dict[str, float | Tensor] = {}
        self._wanted: Held = [{} for _ in self._names]  # the controller's; the guard may hold others
        self._decided: list[tuple[int, Held]] = []
        self._decided_at, self._taken, self._idle = -1, 0, 0
        if isinstance(self.controller, ScheduleController):
            self._check_decisions(self.controller.decisions)
        if self.guard:
            self.guard.start(total_steps, source.base_curve)
            self.guard.check_length()
        base = BaseValues(first_rates(optimizer.param_groups, inner is not None))
        if attach := getattr(self.controller, "attach", None):  # for one that watches the optimizer
            attach(optimizer)
        try:
            self.last_epoch, wanted = 0, self._first_decision()
        except BaseException:
            if detach := getattr(self.controller, "detach", None):
                detach()
            raise

        _attached[optimizer] = weakref.ref(self)
        self._hooks = [optimizer.register_load_state_dict_post_hook(weak_hook(self._write))]
        if count == "optimizer":  # under "calls" nothing of ours runs within the optimizer's step
            self._hooks.append(optimizer.register_step_post_hook(weak_hook(self._count)))
        self._base, self._wanted = base, wanted
        super().__init__(optimizer)

    # -------------------------------------------------------------------------
    # what a training loop calls

    def observe(self, loss: float | Tensor | None = None, **observations: float | Tensor) -> None:
        """Say what was measured since the last decision; `loss` is the training loss of this step.

        Names are those of jel/features.py (`grad_norm`, `probe_loss`), and `val_loss`. Each holds until it is told
        anew. A tensor is read when a decision needs it, not here. Raises `JelError` for a name that is none.
        """
        if loss is not None:
            observations["train_loss"] = loss
        if unknown := observations.keys() - GIVEN:
            raise JelError(f"observe() takes loss, {', '.join(sorted(GIVEN))}, and not {', '.join(sorted(unknown))}")
        for name, value in observations.items():
            self._observed[name] = one_number(name, value)
        tell = getattr(self.controller, "observe", None)  # of one that keeps count of its own; it may decide anew
        if tell is not None and tell(**{name: self._observed[name] for name in observations}):
            self._hold(self._decide(self.last_epoch, None))
        if self.guard and "train_loss" in observations:
            self.guard.observe(self.last_epoch + 1, self._observed["train_loss"])
        if self.guard and "val_loss" in observations and self._on:
            now = self._taken if self.count == "optimizer" else self.last_epoch
            self._follow()
            self._guarded(now, lambda guard: guard.validated(now, self._observed["val_loss"]))
            self._write()  # going back may have brought other values with it
        if self._decided_at < 0 and not self._missing():  # a first decision that waited for an observation
            self._hold(self._decide(self.last_epoch, None))
            self._decided_at = self.last_epoch

    def step(self, *args: Any, **named: Any) -> None:
        """After `optimizer.step()`: the next step's values. Arguments go to `inner`.

        Raises `JelError`, and leaves the optimizer as it was, past `total_steps`, for an observation that the
        controller needs and was not given, and for param groups that have changed.
        """
        if (args or named) and self.inner is None:  # torch's deprecated way to go to a step
            if named or type(args[0]) is not int:
                what = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in named.items())])
                raise JelError(f"step({what}), and there is no inner scheduler: tell a loss to observe()")
            self._restart(args[0])
            return
        groups, taken = self._groups(), self._steps_taken
        if taken > self.total_steps:
            raise JelError(f"step {taken} is past total_steps, {self.total_steps}")
        self._warn_if_idle(taken)
        new = taken > self.last_epoch  # else `step` is called more often than the optimizer steps
        before, own_count = self.last_epoch, isinstance(self.inner, ReduceLROnPlateau)
        if self.guard and new:
            self.guard.check_told(taken, before)
        changed, due = self._follow(), self.decision_due
        wanted = self._decide(taken, self._wanted if self._decided_at >= 0 else None) if due else self._wanted
        if self.inner is not None and (
            args or named or new and not own_count
        ):  # a metric's steps are not ours to count
            self._base.step_inner(groups, lambda: self.inner.step(*args, **named))  # type: ignore[union-attr]
        self.last_epoch = self._taken = taken
        self._wanted, self._decided_at = wanted, taken if due else self._decided_at
        self._step_count += 1
        if new:
            self._guarded(taken, lambda guard: guard.judge(taken, before))
        if changed or due or self.inner is not None or self.guard:  # a guard's snapshot may have brought others back
            self._write()

    @property
    def decision_due(self) -> bool:
        """Whether the next `step()` decides: between `optimizer.step()` and it, the time to measure what that takes."""
        return self._decision_steps[bisect_right(self._decision_steps, self._steps_taken) - 1] > self._decided_at

    @property
    def multipliers(self) -> dict[str, dict[str, float]]:
        """What holds now, by param group (its name, or its index) and hyperparameter."""
        return {name: dict(own) for name, own in zip(self._names, self._held())}

    def recorded(self) -> dict[str, Any]:
        """What was decided so far, rates that a guard cut included, as a schedule for any length (jel/recording.py).

        A replay goes back to no weights: where a guard did, it repeats the rates that made it.
        """
        about = self.total_steps, self._names, self.optimizer, self._base_schedule, f"recorded from {self._source.name}"
        return recorded_schedule(self._decided, *about, self._source.knobs)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates that this scheduler has written, a group each."""
        return list(self._last_lr)

    def release(self) -> None:
        """Let go of the optimizer: base values in its groups, and another scheduler may be attached."""
        if (attached := _attached.get(self.optimizer)) is None or attached() is not self:
            return  # released before
        self._follow()
        self._base.release(self._groups(), [dict.fromkeys(own, 1.0) for own in self._held()])
        for hook in self._hooks:
            hook.remove()
        if detach := getattr(self.controller, "detach", None):
            detach()
        _attached.pop(self.optimizer, None)

    def __reduce__(self) -> Any:
        raise JelError("a jel.Scheduler cannot be copied or pickled: make one anew and load its state_dict()")

    # -------------------------------------------------------------------------
    # state

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts of them, and what the controller and `inner` keep."""
        self._follow()  # a scheduler beside this one may have stepped after it
        return {
            "version": VERSION,
            "schedule": self._source.id,
            "groups": list(self._names),
            "total_steps": self.total_steps,
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
            "taken": self._taken,
            "decided_at": self._decided_at,
            "multipliers": [dict(own) for own in self._wanted],
            "decided": [[step, [dict(own) for own in held]] for step, held in self._decided],
            "base": self._base.state_dict(),
            "observed": {name: float(value) for name, value in self._observed.items()},
            "controller": self.controller.state_dict(),
            "inner": self.inner.state_dict() if self.inner is not None else None,
            "guard": self.guard.state_dict() if self.guard else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as the scheduler that gave the state would have, and write its values into the param groups.

        Raises `JelError`, before anything is changed, for a state of another schedule, length or set of groups.
        """
        state = read_state(state_dict, VERSION, self._source.id, self.total_steps, self._names, self._groups())
        for part, what in (("inner", "an inner scheduler"), ("guard", "a guard")):
            if (state[part] is None) != (getattr(self, part) is None):
                raise JelError(f"the saved run had {what} and this one has none, or the other way round")
        if self.guard is not None:
            self.guard.check_state(state["guard"])
        self.controller.load_state_dict(state["controller"])
        if self.inner is not None:
            self.inner.load_state_dict(state["inner"])
        if self.guard:
            self.guard.load_state_dict(state["guard"])
        self.last_epoch, self._taken = state["last_epoch"], state["taken"]
        self._step_count, self._decided_at = state["step_count"], state["decided_at"]
        self._wanted, self._observed, self._decided = state["multipliers"], state["observed"], state["decided"]
        self._base.load_state_dict(state["base"])
        self._write()

    # -------------------------------------------------------------------------
    # inside

    def _initial_step(self) -> None:
        """Torch calls it at construction, and `SequentialLR` again when it begins with this scheduler."""
        self._step_count = 1
        if self.last_epoch < 0 and hasattr(self, "_last_lr"):
            self._restart(0)
        else:
            self.last_epoch = 0
            self._write()

    def _update_lr(self, epoch: int | None = None) -> None:
        """`SequentialLR` calls it with 0 when this scheduler's turn begins."""
        self.step() if epoch is None else self._restart(epoch)

    def _restart(self, step: int) -> None:
        if not 0 <= step <= self.total_steps:
            raise JelError(f"step {step} lies outside of the run's {self.total_steps}")
        groups = self._groups()
        wanted = self._decide(step, None)
        if self.inner is None:
            self._base = BaseValues([initial(group, "lr") for group in groups])
        self.last_epoch = self._taken = self._decided_at = step
        self._wanted = wanted
        self._write()

    def _check_decisions(self, decisions: list[dict[str, Any]]) -> None:
        for i, decision in enumerate(decisions):
            held = multipliers_of_groups(decision["multipliers"], self._names, self._groups())
            for name, own, within in zip(self._names, held, bounded(held, None, self._names, self._source.knobs)):
                for key, value in own.items():
                    given = key in self._bounds if isinstance(self._bounds, Mapping) else self._bounds is not None
                    if value != within[key] and not given:
                        raise JelError(
                            f"{self._source.name}, decision {i}: multiplier {name}.{key} is {value:g}, outside of the "
                            f"bounds {BOUNDS[0]:g}..{BOUNDS[1]:g}; give bounds= to cut it there or to allow more"
                        )

    @property
    def _steps_taken(self) -> int:
        return self._taken if self.count == "optimizer" else self.last_epoch + 1

    def _first_decision(self) -> Held:
        if self._missing() - AT_START:
            return self._wanted  # until `observe` is told: the base
        wanted = self._decide(0, None)
        self._decided_at = 0
        return wanted

    def _missing(self) -> set[str]:
        return set(self.controller.observes) - {"progress", "step"} - self._observed.keys()

    def _decide(self, step: int, before: Held | None) -> Held:
        """What the controller decides at this step, checked and bounded, for each group."""
        missing = self._missing() - (AT_START if step == 0 else set())
        if missing:
            how = ", ".join("loss=..." if name == "train_loss" else f"{name}=..." for name in sorted(missing))
            raise JelError(f"{self._source.name} observes what it was not told: call observe({how}) before step()")
        known = {name: float(value) for name, value in self._observed.items()}
        known |= {"progress": min(step, self.total_steps - 1) / self.total_steps, "step": float(step)}
        seen = {name: known.get(name, math.nan) for name in self.controller.observes}
        decision: Decision = as_decision(self.controller.decide(seen))
        if decision.go_back is not None:
            if self.guard is None:
                raise JelError("the controller asks to go back, and there is no guard with a snapshot to go back to")
            self.guard.go_back(step - decision.go_back)
        wanted = multipliers_of_groups(decision.multipliers, self._names, self._groups())
        if isinstance(self._bounds, Mapping):
            check_bound_names(self._bounds, wanted, self._names, self._groups())
        if self.guard and not hasattr(self.controller, "applied"):
            wanted = with_rates(wanted, self.guard.rates_left)
        wanted = bounded(wanted, before, self._names, self._source.knobs, self._bounds, self._max_change)
        self._note(step, wanted)
        return wanted

    def _note(self, step: int, wanted: Held) -> None:
        """Keep what was decided, for `recorded`: the last word on a step, and none after the last step."""
        kept = [(at, held) for at, held in self._decided if at < step]
        self._decided = kept + ([(step, wanted)] if step < self.total_steps else [])

    def _guarded(self, step: int, look: Callable[[Guard], None]) -> None:
        """Have the guard look; where it goes back, momenta that are not finite go, or the weights would not stay so.

        A retreat cuts the rates: now, and in all decisions to come, unless the controller is told what was `applied`
        and goes on from there.
        """
        if self.guard is None:
            return
        before = self.guard.tripped, self.guard.retreated
        look(self.guard)
        if (self.guard.tripped, self.guard.retreated) == before:
            return
        forget_broken(self.optimizer)
        if self.guard.retreated > before[1]:
            cut = with_rates(self._wanted, self.guard.cut)
            self._wanted = bounded(cut, None, self._names, self._source.knobs, self._bounds)
            self._note(step, self._wanted)

    def _held(self) -> Held:
        if self.guard and self.guard.holds_base(self.last_epoch):
            return with_rates([dict.fromkeys(own, 1.0) for own in self._wanted], self.guard.rates_left)
        return self._wanted

    def _count(self, *_: Any) -> None:
        self._taken += 1

    def _follow(self) -> bool:
        """Take over what others have written into the groups; whether there was anything."""
        return self._on and self._base.follow(self._groups(), self._held())

    def _hold(self, wanted: Held) -> None:
        self._follow()
        self._wanted = wanted
        self._write()

    @property
    def _on(self) -> bool:
        """Whether the groups are ours to write: not while a `SequentialLR` has another scheduler's turn."""
        return self.last_epoch >= 0

    def _write(self, *_: Any) -> None:
        if not self._on:
            return
        groups, held = self._groups(), self._held()
        self._base.write(groups, held)
        if applied := getattr(self.controller, "applied", None):  # bounds and the guard may have had their say
            applied(held)
        self._last_lr = [copied(live(group, "lr")) for group in groups]

    def _groups(self) -> list[dict[str, Any]]:
        if group_names(self.optimizer) != self._names:
            now = len(self.optimizer.param_groups)
            raise JelError(
                f"the optimizer's param groups have changed, from {len(self._names)} to {now}: make the scheduler anew"
            )
        return self.optimizer.param_groups

    def _warn_if_idle(self, taken: int) -> None:
        self._idle = self._idle + 1 if taken == self.last_epoch else 0
        if self._idle == IDLE and taken == 0:
            warnings.warn(
                f"jel.Scheduler: {IDLE} calls of step() and no optimizer step seen; if they run in a captured graph or "
                "outside of this optimizer, give count='calls'",
                stacklevel=3,
            )


def _check_free(optimizer: Optimizer, inner: LRScheduler | None) -> None:
    other = _attached.get(optimizer)
    if other is not None and other() is not None:
        raise JelError("this optimizer already has a jel.Scheduler: call its release() first")
    if inner is not None and unwrapped(getattr(inner, "optimizer", None)) is not optimizer:
        raise JelError("inner is a scheduler of another optimizer")
