"""LHOPT's second reward: how much sooner than a baseline a run got where it is. Pure functions.

The baseline is the policy's own average (Polyak) on the same task; a power law is fitted to its loss curve, and the
reward is the log of the time that the curve needs for the run's final loss, over the time that the run had.

Shapes: N points of a curve, E episodes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FIT_POINTS = 14  # the paper's power_curve_fit_npoints
EXTRAPOLATION = 2.0  # the curve is trusted up to this many times the run's length
CLIP = 3.0
LEAST_SLOPE = 0.02  # a curve that hardly falls would make any gain an endless speed-up


def fit_power_law(times: Tensor, losses: Tensor) -> tuple[float, float]:
    """(log a, alpha) of the least-squares line through (log t, log loss): loss = a t^alpha. Points (N,), t > 0.

    Points that are not finite and positive do not count. alpha is at most -`LEAST_SLOPE`, so that the curve falls;
    log a is fitted again under it. Fewer than two points give a flat guess through what there is, or (0, -1).
    """
    good = losses.isfinite() & (losses > 0) & (times > 0)
    x, y = times[good].double().log(), losses[good].double().log()
    if len(x) == 0:
        return 0.0, -1.0
    spread = x - x.mean()
    slope = float((spread * y).sum() / spread.square().sum().clamp_min(1e-12)) if len(x) > 1 else -LEAST_SLOPE
    alpha = min(slope, -LEAST_SLOPE)
    return float(y.mean() - alpha * x.mean()), alpha


def log_speedup(final: Tensor, total: float, log_a: float, alpha: float) -> Tensor:
    """`log(t* / total)`, t* being where the curve meets the final losses (E,), clipped to +-`CLIP`.

    Beyond `EXTRAPOLATION` times the run's length the curve is not trusted; a loss that is not finite gets -`CLIP`.
    """
    log_t = (final.double().clamp_min(1e-30).log() - log_a) / alpha
    gain = (log_t - math.log(total)).clamp(-CLIP, math.log(EXTRAPOLATION))
    return torch.where(final.isfinite(), gain, -CLIP).float()


def last_points(curve: Tensor, total: float) -> tuple[Tensor, Tensor]:
    """The last `FIT_POINTS` of a curve (K + 1,) read at even distances from 0 to `total` -> times and losses."""
    times = torch.linspace(0, total, len(curve))
    return times[-FIT_POINTS:], curve[-FIT_POINTS:]
