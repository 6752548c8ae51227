"""Episodes of one small task, trained side by side by AdamW with hyperparameters of their own, and measured.

Shapes: E episodes, P parameters, T steps, B batch, A knobs, I inner statistics. What an episode does depends on the
task and on its seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jel.tasks.small.models import LOSSES, Model
from jel.unitless import MEASURE_EVERY, SUMS, inner_statistics

HYPERPARAMETERS = ("lr", "weight_decay", "ombeta1", "ombeta2")  # what `train` is given, in this order
DEFAULTS = (1e-3, 1e-2, 0.1, 1e-2)
EPSILON = 1e-8
PRETRAINED_NOISE = 0.05  # times a random start


@dataclass(frozen=True)
class Split:
    inputs: Tensor  # (N, ...)
    targets: Tensor  # (N, ...)


@dataclass(frozen=True)
class SmallTask:
    """What is trained: a model, its loss, three splits, T steps of B rows."""

    model: Model
    loss: str
    steps: int
    batch: int
    train: Split
    val: Split  # what a controller sees
    test: Split  # what it is judged by
    # the model's weights are this times the parameters, all or each (P,): its best rates are smaller by as much
    scale: float | Tensor = 1.0
    pretrained: Tensor | None = None  # weights (P,) to start from, but for a little noise

    @property
    def n_params(self) -> int:
        return self.model.n_params

    def losses(self, flat: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Parameters (E, P), inputs (E or 1, B, ...) -> losses (E,)."""
        weights = flat if isinstance(self.scale, float) and self.scale == 1 else flat * self.scale
        return LOSSES[self.loss](self.model.forward(self.model.tensors(weights), inputs), targets)


def adamw_direction(m: Tensor, v: Tensor, decay1: Tensor, decay2: Tensor) -> Tensor:
    """Adam's direction from its averages (E, P); `decay` (E, 1): the running products of the betas so far.

    The products stay right when betas change on the way, which `beta ** step` does not.
    """
    denominator = v.sqrt().mul_((1 - decay2).rsqrt()).add_(EPSILON)
    return torch.div(m, denominator, out=denominator).mul_(1 / (1 - decay1))


class Episodes:
    """Runs side by side. `train(steps, values)` goes on; the readings of a decision are read off it."""

    def __init__(self, task: SmallTask, seeds: Sequence[int], measure: bool = True):
        self.task, self.measure = task, measure
        starts, rows = [], []
        n = len(task.train.inputs)
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            start = task.model.start(generator)
            if task.pretrained is not None:
                start = task.pretrained + PRETRAINED_NOISE * start
            starts.append(start / task.scale)
            rows.append(torch.randint(n, (task.steps, task.batch), generator=generator))
        self.flat = self._before = torch.stack(starts)  # (E, P)
        self.rows = torch.stack(rows, dim=1)  # (T, E, B)
        self.m, self.v = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        e = len(self.flat)
        self.decay1 = self.decay2 = torch.ones(e, 1)
        self.step = 0
        self._saved: dict[int, tuple[Tensor, ...]] = {}
        # readings of the window behind
        self.inner: Tensor | None = None  # (E, I)
        self.train_loss = torch.full((e,), float("nan"))
        self.path = self.outer_update = torch.zeros(e)

    def train(self, steps: int, values: Tensor) -> None:
        """A window of steps under `values` (E, 4) of `HYPERPARAMETERS`."""
        lr, wd, ombeta1, ombeta2 = values.T[:, :, None].unbind(0)  # (E, 1) each
        self._before = self.flat.clone() if self.measure else self.flat
        total, measurements = torch.zeros(len(self.flat)), []
        for i in range(steps):
            at = self.rows[self.step]  # (E, B)
            flat = self.flat.detach().requires_grad_()
            loss = self.task.losses(flat, self.task.train.inputs[at], self.task.train.targets[at])
            (g,) = torch.autograd.grad(loss.sum(), flat)
            measuring = self.measure and i % MEASURE_EVERY == 0
            if measuring:
                m_before = self.m / (1 - self.decay1).clamp_min(1e-12)
            self.m.lerp_(g, ombeta1)
            self.v.lerp_(g * g, ombeta2)
            self.decay1, self.decay2 = self.decay1 * (1 - ombeta1), self.decay2 * (1 - ombeta2)
            update = adamw_direction(self.m, self.v, self.decay1, self.decay2).mul_(lr)
            if measuring:
                measurements.append(measure(g, m_before, self.flat, update + lr * wd * self.flat))
            self.flat.mul_(1 - lr * wd).sub_(update)
            self.step += 1
            total += loss.detach()
        self.train_loss = total / steps
        if measurements:
            sums = torch.stack(measurements, dim=1)  # (8, M, E)
            self.inner = inner_statistics(as_sums(sums, self.task.n_params)).mean(0)
            self.path = sums[3].clamp_min(0).sqrt().mean(0) * steps
            self.outer_update = (self.flat - self._before).norm(dim=1)

    @torch.no_grad()
    def evaluate(self, split: str) -> Tensor:
        """Loss (E,) over a whole split."""
        data: Split = getattr(self.task, split)
        return self.task.losses(self.flat, data.inputs[None], data.targets[None])

    @torch.no_grad()
    def param_norm(self) -> Tensor:
        return self.flat.norm(dim=1)

    @torch.no_grad()
    def put_back(self, flat: Tensor, episodes: Tensor) -> None:
        """Give those episodes for which `episodes` (E,) is True these weights (E, P); their averages stay.

        But those of an episode that holds one which is not finite begin anew.
        """
        self.flat = torch.where(episodes[:, None], flat, self.flat)
        self.outer_update = (self.flat - self._before).norm(dim=1)
        broken = (episodes & ~(self.m.isfinite() & self.v.isfinite()).all(1))[:, None]
        self.m, self.v = self.m.masked_fill(broken, 0.0), self.v.masked_fill(broken, 0.0)
        self.decay1, self.decay2 = (d.masked_fill(broken, 1.0) for d in (self.decay1, self.decay2))

    # registers: weights and optimizer state of some of the episodes

    def save(self, slot: int, episodes: Tensor) -> None:
        """Keep the state of those episodes for which `episodes` (E,) is True."""
        now = (self.flat, self.m, self.v, self.decay1, self.decay2)
        held = self._saved.get(slot, now)
        self._saved[slot] = tuple(torch.where(episodes[:, None], a, b) for a, b in zip(now, held))

    def load(self, slot: int, episodes: Tensor) -> None:
        """Give those episodes back what `save` kept. The steps they have taken stay taken."""
        if slot not in self._saved:
            return
        now = (self.flat, self.m, self.v, self.decay1, self.decay2)
        back = tuple(torch.where(episodes[:, None], a, b) for a, b in zip(self._saved[slot], now))
        self.flat, self.m, self.v, self.decay1, self.decay2 = back


def measure(g: Tensor, m: Tensor, p: Tensor, d: Tensor) -> Tensor:
    """One measurement of vectors (E, P): the first eight of `jel.unitless.SUMS` (8, E)."""
    dot = lambda a, b: torch.einsum("ep,ep->e", a, b)
    return torch.stack([dot(g, g), dot(m, m), dot(p, p), dot(d, d), dot(g, m), dot(g, p), dot(g, d), d.abs().sum(1)])


def as_sums(sums: Tensor, n_params: int) -> dict[str, Tensor]:
    """(8, ...) -> what `inner_statistics` takes: nothing clips here, and Adam's epsilon is far below everything."""
    n = torch.tensor(float(n_params))
    return {**dict(zip(SUMS, sums)), "n": n, "clipped": torch.tensor(0.0), "above_epsilon": n}
