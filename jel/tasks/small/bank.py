"""The bank: what every task's baselines reach, computed once, and the score that comes of it.

Baselines are AdamW at `RATES` x `SCHEDULES` x `DECAYS`, the same seeds for all. Score 0 is the default (1e-3, constant,
decay 1e-2), 1 the best of the baselines, chosen with hindsight by its mean test loss.

Shapes: J settings, R seeds, T steps, E episodes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from jel.errors import JelError
from jel.files import json_bytes, read_json, write_files
from jel.tasks.small.episodes import DEFAULTS, Episodes, SmallTask
from jel.tasks.small.kinds import Spec, build, draw

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
DECAYS = (1e-2, 1.0)
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}
SETTINGS = tuple(itertools.product(RATES, SCHEDULES, DECAYS))
DEFAULT = SETTINGS.index((DEFAULTS[0], "constant", DEFAULTS[1]))
SEEDS = tuple(range(1000, 1008))
MOST_NUMBERS = 600_000  # parameters side by side: more falls out of the processor's cache
SCORE_CLIP = 3.0
LARGEST_FIXED_SCORE = 0.7
LEAST_GAP = 3.0  # standard errors
VERSION = 1


@dataclass(frozen=True)
class BankTask:
    """A task and the test losses (J, R) of its baselines."""

    spec: Spec
    losses: Tensor

    @property
    def name(self) -> str:
        return f"{self.spec['kind']}-{self.spec['seed']}"

    @property
    def task(self) -> SmallTask:
        return build(self.spec)

    @cached_property
    def default(self) -> float:
        return float(self.losses[DEFAULT].mean())

    @cached_property
    def best_setting(self) -> int:
        return int(self.losses.mean(1).nan_to_num(math.inf).argmin())

    @cached_property
    def oracle(self) -> float:
        return float(self.losses[self.best_setting].mean())

    @cached_property
    def gap_in_standard_errors(self) -> float:
        """Of the paired difference between default and oracle over the seeds."""
        gap = self.losses[DEFAULT] - self.losses[self.best_setting]
        error = float(gap.std()) / len(gap) ** 0.5
        return float(gap.mean()) / max(error, 1e-12)

    def score(self, loss: Tensor) -> Tensor:
        """Test losses -> scores, clipped; a loss that is not finite scores the least."""
        score = (self.default - loss) / max(self.default - self.oracle, 1e-12)
        return score.nan_to_num(-SCORE_CLIP, SCORE_CLIP, -SCORE_CLIP).clamp(-SCORE_CLIP, SCORE_CLIP)

    def paired_score(self, losses: Tensor) -> Tensor:
        """Test losses (R,) of the bank's seeds -> scores, each against the default run of its own seed; clipped.

        Runs of a seed share start and batches, so that most of the noise cancels. The default scores 0.
        """
        score = (self.losses[DEFAULT] - losses) / max(self.default - self.oracle, 1e-12)
        return score.nan_to_num(-SCORE_CLIP, SCORE_CLIP, -SCORE_CLIP).clamp(-SCORE_CLIP, SCORE_CLIP)


def run_schedule(task: SmallTask, seeds: Sequence[int], rates: Tensor, decays: Tensor) -> Tensor:
    """AdamW under rates (T, E) and decays (E,), one run a seed -> test losses (E,)."""
    episodes = Episodes(task, seeds, measure=False)
    rest = torch.tensor(DEFAULTS[2:]).expand(len(seeds), -1)
    for rate in rates:
        episodes.train(1, torch.cat([rate[:, None], decays[:, None], rest], 1))
    return episodes.evaluate("test")


def baselines(task: SmallTask, settings: Sequence[tuple], seeds: Sequence[int]) -> Tensor:
    """Test losses (J, R) of the settings, as many side by side as is fast."""
    together = max(1, MOST_NUMBERS // (task.n_params * len(seeds)))
    losses = []
    for first in range(0, len(settings), together):
        part = settings[first : first + together]
        shape = torch.tensor(
            [[rate * SCHEDULES[name](t / task.steps) for rate, name, _ in part] for t in range(task.steps)]
        )
        rates = shape.repeat_interleave(len(seeds), 1)
        decays = torch.tensor([decay for _, _, decay in part]).repeat_interleave(len(seeds))
        losses.append(run_schedule(task, list(seeds) * len(part), rates, decays).view(len(part), -1))
    return torch.cat(losses)


def bank_task(spec: Spec, folder: Path) -> BankTask:
    """The task's baselines: read from the folder, or computed and written there."""
    path = folder / f"{spec['kind']}-{spec['seed']}.json"
    asked = {"version": VERSION, "spec": spec, "settings": [list(s) for s in SETTINGS], "seeds": list(SEEDS)}
    if path.exists():
        held = read_json(path, "bank entry")
        if isinstance(held, dict) and all(held.get(key) == value for key, value in asked.items()):
            return BankTask(spec, _losses(held["losses"]))
    losses = baselines(build(spec), SETTINGS, SEEDS)
    finite = torch.where(losses.isfinite(), losses, math.nan).tolist()
    write_files({path: json_bytes({**asked, "losses": [[x if x == x else None for x in row] for row in finite]})})
    return BankTask(spec, losses.nan_to_num(math.inf, math.inf))


def load_bank(
    kinds: Iterable[str], seeds: Iterable[int], folder: Path, report: Callable[[BankTask], None] = lambda t: None
) -> list[BankTask]:
    """The tasks of these kinds and seeds, each from the folder or computed now."""
    tasks = []
    for kind, seed in itertools.product(kinds, seeds):
        tasks.append(bank_task(draw(kind, seed), folder))
        report(tasks[-1])
    return tasks


def worth_learning(tasks: Sequence[BankTask]) -> list[BankTask]:
    """The tasks whose gap between default and oracle is at least `LEAST_GAP` standard errors."""
    return [t for t in tasks if t.gap_in_standard_errors >= LEAST_GAP]


def fixed_scores(tasks: Sequence[BankTask]) -> Tensor:
    """The mean score of each setting over the tasks (J,)."""
    return torch.stack([t.score(t.losses).mean(1) for t in tasks]).mean(0)


def check_bank(tasks: Sequence[BankTask]) -> tuple[float, tuple]:
    """The best fixed setting and its score. Raises `JelError` if one setting is good enough for nearly all tasks."""
    scores = fixed_scores(tasks)
    best = int(scores.argmax())
    if scores[best] > LARGEST_FIXED_SCORE:
        raise JelError(
            f"AdamW at {SETTINGS[best]} scores {scores[best]:.2f} on the bank, more than {LARGEST_FIXED_SCORE}: "
            "its tasks are too alike to learn control on"
        )
    return float(scores[best]), SETTINGS[best]


def describe(task: BankTask) -> str:
    rate, schedule, decay = SETTINGS[task.best_setting]
    return (
        f"{task.name:18s} T {task.task.steps:3d} P {task.task.n_params:6d} | default {task.default:.4f} "
        f"oracle {task.oracle:.4f} ({rate:g} {schedule}, {decay:g}) gap {task.gap_in_standard_errors:.1f} errors"
    )


def _losses(rows: list) -> Tensor:
    return torch.tensor([[math.inf if x is None else x for x in row] for row in rows])
