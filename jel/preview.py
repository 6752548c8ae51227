"""What a schedule would do to each param group, found by doing it to an optimizer that nobody trains."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from jel.errors import JelError
from jel.hyperparameters import FROM_ONE, group_names, kind_of, live, unwrapped
from jel.scheduler import Scheduler


@dataclass(frozen=True)
class Effect:
    """What happens to one hyperparameter of one param group; `changes`: (step, value) wherever the value moves."""

    group: str
    kind: str
    tensors: int
    hyperparameter: str
    base: float
    changes: tuple[tuple[int, float], ...]


def preview(optimizer: Optimizer, total_steps: int, schedule: Any, inner: Any = None, **options: Any) -> list[Effect]:
    """Run a `Scheduler` with these arguments over all T steps, without training, and give the optimizer back.

    With `inner` the base moves too, and `inner` is used up. Raises `JelError` for what the scheduler refuses, and for a
    controller that watches the run.
    """
    optimizer = unwrapped(optimizer)
    names, groups = group_names(optimizer), optimizer.param_groups
    base = [dict(group) for group in groups]
    scheduler = Scheduler(optimizer, total_steps, schedule, inner, **{**options, "count": "calls"})
    changes: dict[tuple[int, str], list[tuple[int, float]]] = {}
    try:
        if getattr(scheduler.controller, "watches", False):
            raise JelError("this controller watches the run, so what it will do is not known before")
        for step in range(total_steps):
            with warnings.catch_warnings():  # an inner scheduler misses the optimizer's steps
                warnings.simplefilter("ignore")
                if step:
                    scheduler.step()
            for i, own in enumerate(scheduler.multipliers.values()):
                for key in own:
                    seen, value = changes.setdefault((i, key), []), float(live(groups[i], key))
                    if not seen or seen[-1][1] != value:
                        seen.append((step, value))
    finally:
        scheduler.release()
    return [
        Effect(
            names[i],
            kind_of(optimizer, groups[i]),
            len(groups[i]["params"]),
            key.removeprefix(FROM_ONE),  # the value is that of the momentum itself
            float(live(base[i], key)),
            tuple(c),
        )
        for (i, key), c in sorted(changes.items())
    ]


def table(effects: Sequence[Effect], most: int = 12) -> str:
    """The effects as lines for a terminal; of a value that changes more than `most` times only some are shown."""
    lines = []
    for effect in effects:
        shown = effect.changes[:: -(-len(effect.changes) // most)]
        values = ", ".join(f"{step}: {value:.4g}" for step, value in shown)
        more = f" (of {len(effect.changes)} changes)" if len(shown) < len(effect.changes) else ""
        lines.append(
            f"{effect.group:>16} {effect.kind}, {effect.tensors} tensors: {effect.hyperparameter} {effect.base:.4g} -> "
            f"from step {values}{more}"
        )
    return "\n".join(lines)
