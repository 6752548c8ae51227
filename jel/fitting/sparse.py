"""Episodes whose probe loss is read only where it counts."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from jel.knobs import Multipliers


class EndsOnly:
    """A `Task` (see jel/tasks/base.py) around another: the probe is read at the start and the end of an episode.

    In between the last reading stands. A return that is the total fall of the probe loss is the same, and so is what a
    policy of progress does; only a run that blows up and comes back is not noticed. With a probe as large as a few
    training steps this halves the price of a short episode.
    """

    def __init__(self, task: Any):
        self.task, self.groups = task, task.groups

    def num_steps(self, group: int) -> int:
        return self.task.num_steps(group)

    def reset(self, group: int, episodes: range) -> None:
        self.task.reset(group, episodes)
        self._left = self.task.num_steps(group)
        self._seen: dict[str, Tensor] = {}

    def train(self, first_step: int, steps: int, multipliers: Multipliers) -> None:
        self.task.train(first_step, steps, multipliers)
        self._left -= steps

    def observe(self, names: Collection[str]) -> dict[str, Tensor]:
        if not self._seen or self._left <= 0 or set(names) != self._seen.keys():
            self._seen = self.task.observe(names)
        return dict(self._seen)

    def save(self, slot: int, episodes: Tensor) -> None:
        self.task.save(slot, episodes)

    def load(self, slot: int, episodes: Tensor) -> None:
        self.task.load(slot, episodes)

    def close(self) -> None:
        self.task.close()
