"""A small task for `jel.fit`: runs of AdamW on a task that was drawn, side by side.

```python
result = jel.fit(small_task("regression", seed=3, lr=1e-5), base="unknown")
```

e episodes side by side. The controller sees the validation split; the test split is for whoever judges it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jel.contract import CONSTANT, Contract, GroupContract
from jel.errors import JelError
from jel.knobs import Multipliers, multipliers_of_group
from jel.tasks.small.episodes import DEFAULTS, Episodes, SmallTask
from jel.tasks.small.kinds import HELD_OUT, TRAINING, build, draw

GROUP = "all"  # the one param group
TURNED = ("lr", "weight_decay")


def small_task(kind: str, seed: int = 0, *, lr: float = DEFAULTS[0], weight_decay: float = DEFAULTS[1]) -> SmallRuns:
    """The task of this kind that the seed draws (`jel.tasks.small.kinds.draw`), under AdamW with these base values.

    Raises `JelError` for an unknown kind, or base values that are not above 0.
    """
    if kind not in (*TRAINING, *HELD_OUT):
        raise JelError(f"unknown kind of small task {kind!r}; there are {', '.join((*TRAINING, *HELD_OUT))}")
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not 0 < value < float("inf"):
            raise JelError(f"{name} is {value!r}; it must be a number above 0")
    return SmallRuns(build(draw(kind, seed)), f"{kind}-{seed}", lr, weight_decay)


@dataclass
class SmallRuns:
    """A `Task` (see jel/tasks/base.py) around `Episodes`: those of a group share start and data, and so `group` alone
    seeds them. Base values are held over the run, and `train` multiplies them.
    """

    task: SmallTask
    name: str
    lr: float
    weight_decay: float
    groups = (GROUP,)
    optimizer_kind = "AdamW"
    way = "side by side as one program, with parameters in one row an episode"

    def __post_init__(self) -> None:
        self._running: Episodes | None = None

    @property
    def facts(self) -> tuple[tuple, ...]:
        """What `jel.fit` reads of a group: name, learning rate, weight decay, tensors, parameters."""
        return ((GROUP, self.lr, self.weight_decay, 1, self.task.n_params),)

    @property
    def contract(self) -> Contract:
        base = {"lr": self.lr, "weight_decay": self.weight_decay, "beta1": 1 - DEFAULTS[2], "beta2": 1 - DEFAULTS[3]}
        return Contract((GroupContract("*", "adamw", base),), CONSTANT, self.task.steps)

    def with_steps(self, steps: int) -> SmallRuns:
        """The same task with runs of another length."""
        return replace(self, task=replace(self.task, steps=steps))

    def costs(self) -> tuple[float, None]:
        """(a look at the probe in training steps: its rows' forward passes, a third of a step's; FLOPs unknown)."""
        return len(self.task.val.inputs) / (3 * self.task.batch), None

    def num_steps(self, group: int) -> int:
        return self.task.steps

    def reset(self, group: int, episodes: range) -> None:
        self._running = Episodes(self.task, [group] * len(episodes), measure=False)

    def train(self, first_step: int, steps: int, multipliers: Multipliers) -> None:
        running = self._started()
        own = multipliers_of_group(multipliers, GROUP)
        if unknown := own.keys() - set(TURNED):
            raise JelError(f"multiplier for {', '.join(sorted(unknown))}; a small task has {', '.join(TURNED)}")
        values = torch.tensor([self.lr, self.weight_decay, *DEFAULTS[2:]]).repeat(len(running.flat), 1)
        for column, key in enumerate(TURNED):
            values[:, column] *= torch.as_tensor(own.get(key, 1.0))
        running.train(steps, values)

    def observe(self, names: Collection[str]) -> dict[str, Tensor]:
        known: dict[str, Any] = {
            "probe_loss": lambda: self._started().evaluate("val"),
            "train_loss": lambda: self._started().train_loss,  # mean since the last decision
        }
        if unknown := set(names) - known.keys():
            raise JelError(f"a small task does not observe {', '.join(sorted(unknown))}, only {', '.join(known)}")
        return {name: known[name]() for name in names}

    def save(self, slot: int, episodes: Tensor) -> None:
        self._started().save(slot, episodes)

    def load(self, slot: int, episodes: Tensor) -> None:
        self._started().load(slot, episodes)

    def close(self) -> None:
        self._running = None

    def _started(self) -> Episodes:
        if self._running is None:
            raise JelError("no episode was started: call reset first")
        return self._running
