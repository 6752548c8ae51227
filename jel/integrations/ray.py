"""Ray: episodes on the machines of a cluster. Ray places, restarts and reports; nothing of that is ours.

```python
task = RayTask(LoopTask(..., workers=1), workers=8)      # `jel.fit(task)` then trains each group's episodes there
tuner = ray.tune.Tuner(trainable(task), param_space=search_space(), tune_config=...)    # an episode a trial of Tune
schedule = schedule_of(tuner.fit().get_best_result("probe_loss", "min"))
```
"""

from __future__ import annotations

import warnings
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
    asks for, e.g. `{"num_gpus": 1}`; default one CPU. `actors`: of another RayTask, to be shared, as `with_steps` does.
    Starts Ray on this machine if it is not running. Raises `JelError` for an actor that is gone, and warns if the
    cluster must grow before all actors can start.
    """

    def __init__(
        self, task: Task, workers: int, resources: Mapping[str, Any] | None = None, actors: RayActors | None = None
    ):
        if workers < 1:
            raise JelError(f"a RayTask needs at least one worker, not {workers}")
        self.task, self.groups, self.num_steps = task, task.groups, task.num_steps
        self._shares: dict[int, range] = {}
        self._pool: Any = actors or RayActors(workers, dict(resources or {"num_cpus": 1}))

    def _each(self, method: str, arguments: Callable[[slice, range], tuple]) -> list:
        self._pool.task = self.task
        return super()._each(method, arguments)

    def __getattr__(self, name: str) -> Any:
        """What `jel.fit` asks of a LoopTask beyond the protocol: `facts`, `contract`, `with_steps`, ..."""
        if name.startswith("_") or name == "task":
            raise AttributeError(name)
        found = getattr(self.task, name)
        if name == "with_steps":
            return lambda *given: RayTask(found(*given), len(self._pool), actors=self._pool)
        return found


class RayActors:
    """As `jel.learn.workers.WorkerPool`, with Ray actors for processes; they start with the first call.

    `task` is the one that calls are for. The actors hold every task that there was a call for.
    """

    task: Task

    def __init__(self, workers: int, resources: Mapping[str, Any]):
        self._workers, self._resources = workers, resources
        self._held: dict[int, Task] = {}  # by id, which stays theirs as long as they are here
        self._actors: list[Any] = []

    def __len__(self) -> int:
        return self._workers

    def call(self, method: str, arguments: dict[int, tuple]) -> list:
        """`method(*arguments[i])` in each actor i named, at the same time; the results in that order."""
        try:
            if not self._actors:
                self._start()
            if (key := id(self.task)) not in self._held:
                shared = ray.put(self.task)
                ray.get([actor.hold.remote(key, shared) for actor in self._actors])
                self._held[key] = self.task
            return ray.get([self._actors[i].call.remote(key, method, given) for i, given in arguments.items()])
        except ray.exceptions.RayTaskError as e:
            raise (e.cause if isinstance(e.cause, JelError) else e) from None
        except ray.exceptions.RayActorError as e:
            raise JelError(f"a Ray actor that trains episodes is gone: {' '.join(str(e).split())[:200]}") from None

    def _start(self) -> None:
        if not ray.is_initialized():
            ray.init(include_dashboard=False, logging_level="warning")
        for name, kind in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
            asked, has = len(self) * self._resources.get(name, 0), ray.cluster_resources().get(kind, 0)
            if asked > has:
                warnings.warn(f"the actors ask for {asked:g} {kind} and Ray has {has:g}: waiting", stacklevel=2)
        actor: Any = ray.remote(_Episodes).options(**self._resources)
        self._actors = [actor.remote() for _ in range(len(self))]

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._held = [], {}


class _Episodes:
    """In an actor: answers calls of the methods of the tasks that it holds."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.tasks: dict[int, Task] = {}

    def hold(self, key: int, task: Task) -> None:
        self.tasks[key] = task

    def call(self, key: int, method: str, arguments: tuple) -> Any:
        return getattr(self.tasks[key], method)(*arguments)


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
        loss = run_episode(shared, schedule, group, lambda step, loss: tune.report({"probe_loss": loss, "step": step}))
        tune.report({"probe_loss": loss, "step": shared.num_steps(group)})

    return train


def schedule_of(result: Any, points: int = 4, knobs: Sequence[Knob] = KNOBS) -> dict[str, Any]:
    """The schedule of a Tune result (one that `get_best_result` gives), with the points and knobs of its search."""
    return schedule_from(result.config, knobs, points, "ray tune")
