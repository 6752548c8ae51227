"""What a controller is learned on: training runs that can be started again and again.

e: the episodes that a task trains side by side, a slice of a group.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from torch import Tensor

from jel.knobs import Multipliers


class Task(Protocol):
    """The protocol. What an episode does depends on its group and its index in it alone."""

    groups: tuple[str, ...]  # names of the param groups that a controller may turn

    def num_steps(self, group: int) -> int:
        """T, the steps of an episode of group number `group`; the same for all of its episodes."""

    def reset(self, group: int, episodes: range) -> None:
        """Start these episodes of group number `group` from random initialisation (e of them side by side)."""

    def train(self, first_step: int, steps: int, multipliers: Multipliers) -> None:
        """Train steps first_step, ..., first_step + steps - 1 under the multipliers, whose values are tensors (e,)."""

    def observe(self, names: Collection[str]) -> dict[str, Tensor]:
        """Observations of jel/features.py by name, each (e,); not finite for an episode that has blown up.

        `progress` and `step` are the environment's to fill in and are never asked for.
        """

    def save(self, slot: int, episodes: Tensor) -> None:
        """Keep weights and optimizer state of those episodes for which `episodes`, bool (e,), is True."""

    def load(self, slot: int, episodes: Tensor) -> None:
        """Give those episodes back what `save` kept in the slot. The steps they have taken stay taken."""

    def close(self) -> None:
        """Free what the task holds: threads, processes, memory."""
