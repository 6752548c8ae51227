"""What a controller did in a run, as a schedule: relative multipliers over normalised progress, for any other length.

A small model's run is recorded under a controller that watches, and replayed, without it, on a larger one that starts
from the same base values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch.optim import Optimizer

from jel.contract import Contract
from jel.decisions import Held
from jel.errors import JelError
from jel.knobs import Knob
from jel.schedule import make_schedule


def recorded_schedule(
    decided: Sequence[tuple[int, Held]],
    total_steps: int,
    names: Sequence[str],
    optimizer: Optimizer,
    base_schedule: str,
    source: str,
    knobs: Iterable[Knob] = (),
) -> dict[str, Any]:
    """A schedule of `(step, multipliers of each group)` decisions; groups that were always alike become one "*".

    Its contract asks for the same kinds and base values of the param groups and the same base schedule, and for no
    length. Raises `JelError` if nothing was decided at step 0.
    """
    if not decided or decided[0][0] != 0:
        raise JelError("there is nothing to record: the run has no decision at its first step")
    alike = all(own == held[0] for _, held in decided for own in held)
    rows = [
        {
            "progress": step / total_steps,
            "multipliers": {"*": dict(held[0])} if alike else {n: dict(own) for n, own in zip(names, held) if own},
        }
        for step, held in decided
    ]
    contract = replace(Contract.of(optimizer, total_steps, base_schedule), steps=None)
    return make_schedule(rows, source, contract, tuple(knobs))
