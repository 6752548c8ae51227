"""A task as an environment: observe -> act -> apply -> train, decision by decision.

e episodes side by side, A knobs, S features.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from jel.actions import LogScale
from jel.features import feature_vector, observations_of
from jel.tasks.base import Task


def decision_steps(num_steps: int, interval: int) -> list[tuple[int, int]]:
    """(first step, steps) of each decision: every `interval` steps, the last interval shorter if it must be."""
    return [(first, min(interval, num_steps - first)) for first in range(0, num_steps, interval)]


class Env:
    """Episodes of one task under one set of actions and features; `interval` steps between decisions.

    `measured` names observations that the reward needs beside the features' own; after `reset` and every `step`,
    `readings` holds them as (e,) tensors on the CPU.
    """

    def __init__(self, task: Task, actions: LogScale, features: Sequence[str], interval: int, measured: Sequence[str]):
        self.task, self.actions, self.features, self.interval = task, actions, tuple(features), interval
        self._names = sorted(observations_of(features).union(measured) - {"progress", "step"})
        self.readings: dict[str, Tensor] = {}

    def decisions(self, group: int) -> list[tuple[int, int]]:
        return decision_steps(self.task.num_steps(group), self.interval)

    def reset(self, group: int, episodes: range) -> Tensor:
        """Start these episodes of the group; returns the state of the first decision, (e, S)."""
        self._decisions, self._num_steps, self._done = self.decisions(group), self.task.num_steps(group), 0
        self._e = len(episodes)
        self.task.reset(group, episodes)
        return self._observe()

    def step(self, raw: Tensor) -> Tensor:
        """Take raw actions (e, A), train to the next decision or the end; returns the state there, (e, S)."""
        first, steps = self._decisions[self._done]
        self.task.train(first, steps, self.actions.multipliers(raw))
        self._done += 1
        return self._observe()

    def _observe(self) -> Tensor:
        steps = sum(steps for _, steps in self._decisions[: self._done])
        self.readings = {name: value.cpu() for name, value in self.task.observe(self._names).items()}
        clock = {"progress": steps / self._num_steps, "step": float(steps)}
        return feature_vector(self.features, {**self.readings, **clock}).expand(self._e, -1)
