"""A loss curve as a power law, L(t) = floor + scale * t^-exponent, and where it leads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EXPONENTS = np.geomspace(0.02, 3.0, 60)


@dataclass(frozen=True)
class PowerLaw:
    """`floor + scale * steps^-exponent`."""

    floor: float
    scale: float
    exponent: float

    def at(self, steps: float) -> float:
        return float(self.floor + self.scale * max(steps, 1.0) ** -self.exponent)


def fit_power_law(steps: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """Least squares over the points, in equal weights; a falling curve, with its floor at or above 0 for such losses.

    For each exponent of a grid the other two are linear. At least 3 points, all finite, steps at or above 1; raises
    `ValueError` otherwise. A curve that does not fall is fitted by its mean.
    """
    t, y = np.asarray(steps, dtype=float), np.asarray(losses, dtype=float)
    if len(t) < 3 or t.shape != y.shape or not (np.isfinite(t).all() and np.isfinite(y).all() and (t >= 1).all()):
        raise ValueError("a power law needs at least 3 finite points at steps of 1 or more")
    best, least = PowerLaw(float(y.mean()), 0.0, 1.0), float(((y - y.mean()) ** 2).sum())
    lowest = 0.0 if (y >= 0).all() else -np.inf
    for exponent in EXPONENTS:
        x = t**-exponent
        scale = ((x - x.mean()) * (y - y.mean())).sum() / max(((x - x.mean()) ** 2).sum(), 1e-300)
        floor = y.mean() - scale * x.mean()
        if floor < lowest:
            floor, scale = lowest, (x * (y - lowest)).sum() / (x * x).sum()
        error = float(((floor + scale * x - y) ** 2).sum())
        if scale > 0 and error < least:
            best, least = PowerLaw(float(floor), float(scale), float(exponent)), error
    return best
