"""What LHOPT is compared with on a small task: each takes a task and seeds and gives test losses (R,) and its price.

A price is in training runs of the task. Schedule-Free and Prodigy are the public packages, at their own defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from jel.errors import JelError
from jel.learn.control import LR, Best, boundaries, random_starts
from jel.lhopt import DECISIONS
from jel.tasks.small.bank import RATES, SCHEDULES, SETTINGS, BankTask, run_schedule
from jel.tasks.small.episodes import DEFAULTS, Episodes, SmallTask
from jel.validation_guard import KEEP

NOISE = ((1e-2, 1e2), (0.1, 10.0), (0.1, 10.0), (0.1, 10.0))
RANDOM_STARTS_SEED = 77


def starts_of(task: BankTask, seeds: Sequence[int]) -> Tensor:
    """The random starts (R, 4) that every method which needs some is given on this task."""
    generator = torch.Generator().manual_seed(RANDOM_STARTS_SEED + 1000 * task.spec["seed"])
    return random_starts(len(seeds), generator, NOISE)


def no_control_random(task: BankTask, seeds: Sequence[int]) -> Tensor:
    """AdamW left where it started, at random."""
    episodes, values = Episodes(task.task, seeds, measure=False), starts_of(task, seeds)
    values[:, 2:] = values[:, 2:].clamp(max=0.99)
    episodes.train(task.task.steps, values)
    return episodes.evaluate("test")


def fixed(setting: tuple, guard: bool = False) -> Callable[[BankTask, Sequence[int]], Tensor]:
    """One AdamW setting (rate, schedule, decay), the same on every task.

    `guard`: a run ends with the mean of its best weights on validation, read as often as a policy reads it, and goes
    back to the best of them, at lower rates from then on, where it validates worse than at first.
    """
    rate, name, decay = setting

    def run(task: BankTask, seeds: Sequence[int]) -> Tensor:
        steps = task.task.steps
        shape = torch.tensor([rate * SCHEDULES[name](t / steps) for t in range(steps)])
        if not guard:
            decays = torch.full((len(seeds),), decay)
            return run_schedule(task.task, seeds, shape[:, None].expand(-1, len(seeds)), decays)
        episodes, best = Episodes(task.task, seeds, measure=False), Best(len(seeds), KEEP)
        looks, factor = boundaries(steps, DECISIONS), torch.ones(len(seeds))
        for step in range(steps + 1):
            if step in looks:
                best.see(episodes.flat, val := episodes.evaluate("val"))
                factor = factor * best.retreat(episodes, val)
            if step < steps:
                values = torch.tensor([float(shape[step]), decay, *DEFAULTS[2:]]).repeat(len(seeds), 1)
                values[:, LR] *= factor
                episodes.train(1, values)
        best.load(episodes)
        return episodes.evaluate("test")

    return run


def greedy_lr(
    task: BankTask, seeds: Sequence[int], factor: float = 0.9, patience: int = 1, smooth: float = 0.8, most: float = 0.1
) -> Tensor:
    """GreedyLR's rule (arXiv 2512.14527), on the smoothed training loss of every step, from AdamW's default rate.

    More than `patience` steps in a row below the best loss so far: the rate is divided by `factor`; more than that
    many not below it: multiplied. The rate stays within [1e-5, `most`].
    """
    e = len(seeds)
    episodes, values = Episodes(task.task, seeds, measure=False), torch.tensor(DEFAULTS).repeat(e, 1)
    best, average = torch.full((e,), math.inf), torch.full((e,), math.nan)
    good, bad = torch.zeros(e), torch.zeros(e)
    for _ in range(task.task.steps):
        episodes.train(1, values)
        loss = episodes.train_loss
        average = torch.where(average.isnan(), loss, smooth * average + (1 - smooth) * loss)
        better = average < best
        best = torch.minimum(best, average)
        good, bad = torch.where(better, good + 1, 0.0), torch.where(better, 0.0, bad + 1)
        up, down = good > patience, bad > patience
        values[:, 0] = (values[:, 0] * torch.where(up, 1 / factor, torch.where(down, factor, 1.0))).clamp(1e-5, most)
        good, bad = torch.where(up, 0.0, good), torch.where(down, 0.0, bad)
    return episodes.evaluate("test")


def asha(task: BankTask, seeds: Sequence[int], runs: int = 8) -> Tensor:
    """Successive halving over `runs` AdamW settings drawn at random: a quarter of the steps, half, all; by validation.

    The two left run to the end, and the one with the better validation loss is the result. Schedules are those of the
    whole run. Price: runs / 4 + runs / 8 + runs / 8 = half as many runs as settings.
    """
    results, steps = [], task.task.steps
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed + 31 * task.spec["seed"])
        u = torch.rand(runs, 2, generator=generator)
        rates = RATES[0] * (RATES[-1] / RATES[0]) ** u[:, 0]
        decays = 1e-3 * 1e3 ** u[:, 1]
        names = torch.randint(len(SCHEDULES), (runs,), generator=generator)
        shapes = torch.tensor([[shape(t / steps) for shape in SCHEDULES.values()] for t in range(steps)])  # (T, 3)
        episodes, alive = Episodes(task.task, [seed] * runs, measure=False), torch.ones(runs, dtype=torch.bool)
        rest = torch.tensor(DEFAULTS[2:]).expand(runs, -1)
        for t in range(steps):
            values = torch.cat([(rates * shapes[t, names])[:, None], decays[:, None], rest], 1)
            episodes.train(1, values)  # those out of the race train on: they count for nothing
            if t + 1 in (steps // 4, steps // 2):
                val = torch.where(alive, episodes.evaluate("val").nan_to_num(math.inf), math.inf)
                keep = val.argsort()[: int(alive.sum()) // 2]
                alive = torch.zeros(runs, dtype=torch.bool).index_fill(0, keep, True)
        val = torch.where(alive, episodes.evaluate("val").nan_to_num(math.inf), math.inf)
        results.append(episodes.evaluate("test")[val.argmin()])
    return torch.stack(results)


# -----------------------------------------------------------------------------
# public optimizers, a run at a time


def run_optimizer(task: SmallTask, seed: int, make: Callable[[list], torch.optim.Optimizer], schedule: str) -> float:
    """Train with any torch optimizer over the flat parameters; the test loss."""
    episodes = Episodes(task, [seed], measure=False)
    flat = torch.nn.Parameter(episodes.flat.clone())
    optimizer = make([flat])
    base = [group["lr"] for group in optimizer.param_groups]
    modes = hasattr(optimizer, "train") and hasattr(optimizer, "eval")
    if modes:
        optimizer.train()  # type: ignore[attr-defined]
    for t in range(task.steps):
        for group, lr in zip(optimizer.param_groups, base):
            group["lr"] = lr * SCHEDULES[schedule](t / task.steps)
        at = episodes.rows[t]
        loss = task.losses(flat, task.train.inputs[at], task.train.targets[at]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if modes:
        optimizer.eval()  # type: ignore[attr-defined]
    episodes.flat = flat.detach()
    return float(episodes.evaluate("test"))


def schedule_free(task: BankTask, seeds: Sequence[int]) -> Tensor:
    """Schedule-Free AdamW at its package's default rate of 0.0025, no warm-up, AdamW's default decay."""
    from schedulefree import AdamWScheduleFree

    make = lambda params: AdamWScheduleFree(params, lr=0.0025, weight_decay=DEFAULTS[1])
    return torch.tensor([run_optimizer(task.task, seed, make, "constant") for seed in seeds])


def prodigy(task: BankTask, seeds: Sequence[int]) -> Tensor:
    """Prodigy at lr 1 with cosine annealing, as its authors advise. Raises `JelError` if it is not installed."""
    try:
        from prodigyopt import Prodigy
    except ImportError:
        raise JelError("this rival needs prodigyopt: pip install prodigyopt") from None
    make = lambda params: Prodigy(params, lr=1.0, weight_decay=DEFAULTS[1])
    return torch.tensor([run_optimizer(task.task, seed, make, "cosine") for seed in seeds])


# name -> (function, price in runs of the task)
RIVALS: dict[str, tuple[Callable[[BankTask, Sequence[int]], Tensor], float]] = {
    "no control, random start": (no_control_random, 1),
    "AdamW cosine 1e-3": (fixed((1e-3, "cosine", 1e-2)), 1),
    "Schedule-Free AdamW": (schedule_free, 1),
    "Prodigy": (prodigy, 1),
    "GreedyLR": (greedy_lr, 1),
    "ASHA, 8 settings": (asha, 4),
}
GRID_PRICE = len(SETTINGS)
