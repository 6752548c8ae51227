"""Anyone's PyTorch training loop as a task: what `jel.fit` learns a schedule on.

```python
task = LoopTask(make_model, make_optimizer, train_loader, loss, probe_batches, steps=2000)
result = jel.fit(task, budget=2.0)
```
"""

from __future__ import annotations

import copy
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from jel.contract import Contract
from jel.errors import JelError
from jel.knobs import Multipliers
from jel.tasks.base import Task
from jel.tasks.loop_batched import BatchedEpisodes, why_not_batched
from jel.tasks.loop_plain import Loop, PlainEpisodes, group_facts, own_randomness, seed_all

WAYS = ("auto", "batched", "workers", "plain")
ENGINES: dict[str, Callable[[Loop, int, tuple], Task]] = {"batched": BatchedEpisodes, "plain": PlainEpisodes}


@dataclass(frozen=True)
class Way:
    """How episodes run, and why: "batched" or "plain", in this process or shared by several."""

    engine: str
    workers: int
    why: str

    def __str__(self) -> str:
        how = {"batched": "batched, side by side as one program", "plain": "one after another"}[self.engine]
        if self.workers > 1:
            how = f"in {self.workers} worker processes" + (", batched in each" if self.engine == "batched" else "")
        return f"{how}: {self.why}"


class LoopTask:
    """A `Task` (see jel/tasks/base.py): runs of an ordinary training loop, given in pieces.

    `make_model()` gives a model with fresh weights; it is called under a seed. `make_optimizer(model)` gives the
    optimizer with the rates as they are today: the base. `loss(model, batch)` gives the scalar training loss; the
    same function, with the model in eval mode and without gradients, measures the probe. `batches`: a DataLoader, a
    list of batches, or a function of a seed that gives an iterable; begun again whenever it ends. `probe`: held-out
    batches (a list, or any iterable of which the first `probe_batches` are kept), whose mean loss is what is to fall.
    They must not be trained on.

    `steps`: of the real run; default one pass over `batches`. `make_scheduler(optimizer, steps)`: the base schedule of
    a run of so many steps, if there is one. `clip_norm`: gradients are clipped to this norm over all groups.
    `episodes`: "batched" (one program with an episode axis), "workers" (processes), "plain" (one after another) or
    "auto", which takes the first of them that will do; `workers`: how many processes, default one a core.
    The functions move batches to the device of the model themselves if that is needed.

    Raises `JelError` in one line for pieces that do not fit: no probe data, batches that can be read only once, a loss
    that is not finite at the start, an optimizer whose groups change.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        batches: Iterable[Any] | Callable[[int], Iterable[Any]],
        loss: Callable[[nn.Module, Any], Tensor],
        probe: Iterable[Any],
        *,
        steps: int | None = None,
        make_scheduler: Callable[[torch.optim.Optimizer, int], Any] | None = None,
        clip_norm: float | None = None,
        probe_batches: int = 8,
        episodes: str = "auto",
        workers: int | None = None,
        seed: int = 0,
        name: str = "loop",
    ):
        for what, given in (("make_model", make_model), ("make_optimizer", make_optimizer), ("loss", loss)):
            if not callable(given):
                raise JelError(f"{what} must be a function, not {type(given).__name__}")
        if isinstance(make_model, nn.Module):
            raise JelError("make_model must be a function that makes the model, not a model: every episode has its own")
        if clip_norm is not None and not (isinstance(clip_norm, (int, float)) and clip_norm > 0):
            raise JelError(f"clip_norm is {clip_norm!r}; it must be a number above 0, or None")
        if workers is not None and (type(workers) is not int or workers < 1):
            raise JelError(f"workers is {workers!r}; it must be a number of processes, or None")
        if isinstance(batches, Iterator) or not (callable(batches) or isinstance(batches, Iterable)):
            raise JelError(
                "batches must be a DataLoader, a list, or a function of a seed that gives an iterable: every episode "
                f"begins anew, which {type(batches).__name__} cannot"
            )
        if steps is None:
            if not isinstance(batches, Sized):
                raise JelError("how long is the real run? give steps=")
            steps = len(batches)
        if type(steps) is not int or steps < 1:
            raise JelError(f"steps is {steps!r}; it must be the number of steps of the real run, at least 1")
        if episodes not in WAYS:
            raise JelError(f"episodes is {episodes!r}; use one of {', '.join(WAYS)}")
        held_out = _first(probe, probe_batches)
        if not held_out:
            raise JelError("the task has no probe data: give held-out batches as probe, a list or a DataLoader")
        self.loop = Loop(make_model, make_optimizer, batches, loss, held_out, make_scheduler, clip_norm, seed)
        self.name, self.steps, self.asked, self.workers = name, steps, episodes, workers
        with own_randomness():
            optimizer = self.loop.optimizer(self.loop.model(0))
            self.contract = self._contract()
        self.facts, self.optimizer_kind = group_facts(optimizer), type(optimizer).__name__
        self.groups = tuple(fact[0] for fact in self.facts)
        self._way: Way | None = None
        self._running: Task | None = None
        self._check_start()

    @property
    def way(self) -> Way:
        """How the episodes run; found out once."""
        if self._way is None:
            self._way = self._choose()
        return self._way

    def with_steps(self, steps: int, way: Way | None = None) -> LoopTask:
        """The same loop with runs of another length; the base schedule is that of a run so long."""
        other = copy.copy(self)
        other.steps, other._running, other._way = steps, None, way or self.way
        return other

    def costs(self) -> tuple[float, float | None]:
        """(a look at the probe batches, in training steps; FLOPs of a training step), as torch counts FLOPs.

        Where it counts none (a model without matrix products), a forward pass is a third of a training step, and the
        FLOPs are None.
        """
        plain = PlainEpisodes(self.loop, self.steps, self.facts)
        plain.reset(0, range(1))
        with FlopCounterMode(display=False) as training:
            plain.train(0, 1, {"*": {"lr": 1.0}})
        with FlopCounterMode(display=False) as probing:
            plain.observe(["probe_loss"])
        step, probe = float(training.get_total_flops()), float(probing.get_total_flops())
        return (probe / step, step) if step and probe else (len(self.loop.probe) / 3, None)

    def num_steps(self, group: int) -> int:
        return self.steps

    def reset(self, group: int, episodes: range) -> None:
        if self._running is None:
            engine = partial(ENGINES[self.way.engine], self.loop, self.steps, self.facts)
            if self.way.workers > 1:
                from jel.learn.workers import ParallelTask

                try:
                    self._running = ParallelTask(engine, self.way.workers, self.groups, self.num_steps)
                except (pickle.PicklingError, AttributeError, TypeError) as e:
                    raise JelError(f"the loop cannot be sent to worker processes ({e}); use episodes='plain'") from None
            else:
                self._running = engine()
        self._running.reset(group, episodes)

    def train(self, first_step: int, steps: int, multipliers: Multipliers) -> None:
        self._running_task().train(first_step, steps, multipliers)

    def observe(self, names: Collection[str]) -> dict[str, Tensor]:
        return self._running_task().observe(names)

    def save(self, slot: int, episodes: Tensor) -> None:
        self._running_task().save(slot, episodes)

    def load(self, slot: int, episodes: Tensor) -> None:
        self._running_task().load(slot, episodes)

    def close(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None

    def _running_task(self) -> Task:
        if self._running is None:
            raise JelError("no episode was started: call reset first")
        return self._running

    # -------------------------------------------------------------------------

    def _contract(self) -> Contract:
        """What a schedule learned here is for. The base schedule goes by its class, as in `jel.Scheduler`."""
        optimizer = self.loop.optimizer(self.loop.model(0))
        if self.loop.make_scheduler is None:
            return Contract.of(optimizer, self.steps)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = self.loop.make_scheduler(optimizer, self.steps)
        return Contract.of(optimizer, self.steps, type(scheduler).__name__)

    def _check_start(self) -> None:
        """One step of the plain loop, and the probe before it."""
        plain = PlainEpisodes(self.loop, self.steps, self.facts)
        plain.reset(0, range(1))
        try:
            first = plain.observe(["probe_loss"])["probe_loss"]
            plain.train(0, 1, {"*": {"lr": 1.0}})
        except JelError:
            raise
        except Exception as e:
            reason = " ".join(f"{type(e).__name__}: {e}".split())
            raise JelError(f"the first step of the loop fails ({reason[:300]})") from e
        for what, value in (("probe", first), ("training", plain.observe(["train_loss"])["train_loss"])):
            if not value.isfinite().all():
                raise JelError(
                    f"the {what} loss is {float(value[0])} before anything is learned: check the data, the model and "
                    "the loss; no schedule can mend that"
                )

    def _choose(self) -> Way:
        if self.asked == "plain":
            return Way("plain", 1, "as asked")
        if self.asked in ("auto", "batched"):
            reason = why_not_batched(self.loop, self.facts)
            if reason is None:
                workers = self.workers or 1
                return Way("batched", workers, f"{self.optimizer_kind}, no state, a trial agrees with the plain loop")
            if self.asked == "batched":
                raise JelError(f"these episodes cannot be batched: {reason}")
        else:
            reason = "as asked"
        workers = self.workers or os.cpu_count() or 1
        obstacle = None if self.asked == "workers" else self._why_no_workers(workers)
        if obstacle:
            return Way("plain", 1, f"not batched since {reason}; no worker processes since {obstacle}")
        return Way("plain", workers, reason if reason == "as asked" else f"not batched since {reason}")

    def _why_no_workers(self, workers: int) -> str | None:
        if workers < 2:
            return "there is one core"
        main = sys.modules.get("__main__")
        functions = self.loop.make_model, self.loop.make_optimizer, self.loop.loss, self.loop.batches
        if any(getattr(f, "__module__", None) == getattr(main, "__name__", "") for f in functions):
            return "the loop's functions are in the main script, which each process would run again"
        with own_randomness():
            if any(p.device.type != "cpu" for p in self.loop.model(0).parameters()):
                return "the model is not on the CPU"
        try:
            pickle.dumps(self.loop)
        except Exception as e:  # whatever a user's object may raise; the line that says how episodes run names it
            reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
            return f"the loop's functions or batches cannot be sent to a process (as lambdas and closures): {reason}"
        return None


def _first(probe: Iterable[Any], most: int) -> list[Any]:
    """The probe batches, at most so many, read once under a fixed seed."""
    if not isinstance(probe, Iterable):
        raise JelError(f"probe must be a list or another iterable of held-out batches, not {type(probe).__name__}")
    if isinstance(probe, Sequence):
        return list(probe[:most])
    with own_randomness(), warnings.catch_warnings():
        seed_all(0)
        found = []
        for batch in probe:
            found.append(batch)
            if len(found) == most:
                break
        return found
