"""Ray: episodes on the machines of a cluster. Ray places, restarts and reports; nothing of that is ours.

```python
task = RayTask(LoopTask(..., workers=1), workers=8)      # `jel.fit(task)` then trains each group's episodes there
tuner = ray.tune.Tuner(trainable(task), param_space=search_space(), tune_config=...)    # an episode a trial of Tune
schedule = schedule_of(tuner.fit().get_best_result("probe_loss", "min"))
```
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
import torch
from ray import tune

from jel.errors import JelError
from jel.integrations.episodes import KNOBS, run_episode, schedule_from, space_of
from jel.knobs import Knob
from jel.learn.workers import ParallelTask
from jel.tasks.base import Task

# -----------------------------------------------------------------------------
# a group's episodes over the cluster


class RayTask(ParallelTask):
    """A `Task` whose episodes are trained by `workers` Ray actors, each with a copy of `task`.

    What an episode does depends on its index alone, so their number changes no result. `resources`: what an actor
    asks for, e.g. `{"num_gpus": 1}`; default one CPU. Starts Ray on this machine if it is not running. Raises
    `JelError` for an actor that is gone.
    """

    def __init__(self, task: Task, workers: int, resources: Mapping[str, Any] | None = None):
        if workers < 1:
            raise JelError(f"a RayTask needs at least one worker, not {workers}")
        self.task, self.workers, self.resources = task, workers, dict(resources or {"num_cpus": 1})
        self.groups, self.num_steps = task.groups, task.num_steps
        self._shares: dict[int, range] = {}
        self._started: RayPool | None = None

    @property
    def _pool(self) -> RayPool:  # type: ignore[override]
        if self._started is None:  # not before the first episode: a task that is only measured needs no cluster
            self._started = RayPool(self.task, self.workers, self.resources)
        return self._started

    def __getattr__(self, name: str) -> Any:
        """What `jel.fit` asks of a LoopTask beyond the protocol: `facts`, `contract`, `with_steps`, ..."""
        if name.startswith("_") or name == "task":
            raise AttributeError(name)
        found = getattr(self.task, name)
        if name == "with_steps":
            return lambda *given: RayTask(found(*given), self.workers, self.resources)
        return found

    def close(self) -> None:
        if self._started is not None:
            self._started.close()
            self._started = None


class RayPool:
    """As `jel.learn.workers.WorkerPool`, with Ray actors for processes."""

    def __init__(self, task: Task, workers: int, resources: Mapping[str, Any]):
        if not ray.is_initialized():
            ray.init(include_dashboard=False, logging_level="warning")
        shared = ray.put(task)
        actor: Any = ray.remote(_Episodes).options(**resources)
        self._actors = [actor.remote(shared) for _ in range(workers)]

    def __len__(self) -> int:
        return len(self._actors)

    def call(self, method: str, arguments: dict[int, tuple]) -> list:
        """`method(*arguments[i])` in each actor i named, at the same time; the results in that order."""
        try:
            return ray.get([self._actors[i].call.remote(method, given) for i, given in arguments.items()])
        except ray.exceptions.RayTaskError as e:
            raise (e.cause if isinstance(e.cause, JelError) else e) from None
        except ray.exceptions.RayActorError as e:
            raise JelError(f"a Ray actor that trains episodes is gone: {' '.join(str(e).split())[:200]}") from None

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


class _Episodes:
    """In an actor: answers calls of the task's methods."""

    def __init__(self, task: Task):
        torch.set_num_threads(1)
        self.task = task

    def call(self, method: str, arguments: tuple) -> Any:
        return getattr(self.task, method)(*arguments)


# -----------------------------------------------------------------------------
# an episode as a trial of Tune


def search_space(points: int = 4, knobs: Sequence[Knob] = KNOBS) -> dict[str, Any]:
    """Tune's `param_space` of schedules with `points` decisions: a number a knob and decision, on a log scale."""
    return {name: tune.loguniform(*bounds) for name, bounds in space_of(knobs, points).items()}


def trainable(task: Task, points: int = 4, knobs: Sequence[Knob] = KNOBS, group: int = 0) -> Callable[[dict], None]:
    """What Tune runs: an episode under the schedule of the trial's numbers.

    It reports `probe_loss` and `step` before every decision, for Tune's schedulers to stop a bad one, and at the end.
    """
    shared = task.task if isinstance(task, RayTask) else task

    def train(config: dict) -> None:
        schedule = schedule_from(config, knobs, points, "ray tune")
        steps = shared.num_steps(group)
        loss = run_episode(shared, schedule, group, lambda step, loss: tune.report({"probe_loss": loss, "step": step}))
        tune.report({"probe_loss": loss, "step": steps})

    return train


def schedule_of(result: Any, points: int = 4, knobs: Sequence[Knob] = KNOBS) -> dict[str, Any]:
    """The schedule of a Tune result (one that `get_best_result` gives), with the points and knobs of its search."""
    return schedule_from(result.config, knobs, points, "ray tune")
