"""The noise that episodes explore with. E episodes, K decisions, A knobs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def exploration_noise(
    shape: tuple[int, int, int], generator: torch.Generator, correlation: float = 0.0, antithetic: bool = False
) -> Tensor:
    """Standard normal noise (E, K, A); `correlation` between the decisions of an episode one apart (AR(1)).

    With correlation an episode explores a shifted schedule instead of a jittery one, and what it returns tells of one
    direction instead of K. Each decision's own distribution stays standard normal, and the policy gradient still uses
    the density of each decision by itself: that is the gradient of the means, smoothed over time by the noise's own
    correlation (a natural gradient in that metric). `antithetic`: episode 2 i + 1 has the noise of episode 2 i with
    the other sign, so that what does not depend on the actions cancels in each pair. An odd last episode has none.
    """
    E, K, A = shape
    noise = torch.randn(-(-E // 2) if antithetic else E, K, A, generator=generator)
    if correlation:
        fresh = (1 - correlation**2) ** 0.5
        for k in range(1, K):
            noise[:, k] = correlation * noise[:, k - 1] + fresh * noise[:, k]
    return torch.stack([noise, -noise], dim=1).flatten(0, 1)[:E].contiguous() if antithetic else noise


@dataclass(frozen=True)
class Exploration:
    """How a group of episodes explores; by default as in the paper, every decision by itself."""

    correlation: float = 0.0
    antithetic: bool = False

    def noise(self, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        return exploration_noise(shape, generator, self.correlation, self.antithetic)
