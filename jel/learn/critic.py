"""A critic of whole episodes: a Gaussian process from the actions of an episode to its return.

Episodes of a group share their start, so that their returns hardly differ but by what their actions did. A smooth
model of that dependence, fitted to all episodes so far, uses each of them many times, where a likelihood-ratio
gradient uses each once (Bayesian policy gradients, Ghavamzadeh and Engel 2006; Rasmussen and Williams 2006, chapters 2
and 5).

Shapes: N episodes so far, M episodes asked about, K decisions, A knobs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jel.errors import JelError

# The hyperparameters, all logarithms: a length for each knob, and these. (name, mean and variance of a normal prior);
# returns are standardised, positions lie in (-1, 1).
LENGTH_PRIOR = (0.3, 0.5)
PRIORS = {
    "variation": (1.0, 0.25),  # lengths of what varies within an episode, relative to those of its mean
    "signal": (1.0, 2.0),  # variance of what the actions explain
    "group": (-2.0, 2.0),  # variance between groups: another start, other data
    "noise": (-4.0, 2.0),  # variance between episodes alike
}
JITTER = 1e-4


def positions(raw: Tensor) -> Tensor:
    """Where an episode's raw actions (N, K, A) lie within the knobs' bounds, in (-1, 1), float64: same shape."""
    return torch.tanh(raw.double())


def squared_distances(a: Tensor, b: Tensor, lengths: Tensor, variation: Tensor) -> Tensor:
    """Between episodes a (N, K, A) and b (M, K, A), positions: (N, M).

    Means over the decisions are measured in `lengths` (A,), deviations from the mean in `lengths * variation`: how
    much of a knob an episode turned, and how it spread that over its length, matter differently.
    """
    (mean_a, rest_a), (mean_b, rest_b) = ((x.mean(1), x - x.mean(1, keepdim=True)) for x in (a, b))
    scaled = [(rest / (lengths * variation)).flatten(1) / a.shape[1] ** 0.5 for rest in (rest_a, rest_b)]
    return torch.cdist(mean_a / lengths, mean_b / lengths).square() + torch.cdist(*scaled).square()


class Critic:
    """The process. `fit` to all episodes so far, then ask for the return of other actions.

    `unit` is the standard deviation of the returns that it was fitted to.
    The hyperparameters are those of the highest posterior density, found by `steps` of Adam from the last fit's.
    Deterministic: one thread, double precision.
    """

    def __init__(self, n_actions: int, steps: int = 60):
        self.n_actions, self.steps = n_actions, steps
        priors = [LENGTH_PRIOR] * n_actions + list(PRIORS.values())
        self._prior_mean, self._prior_variance = torch.tensor(priors, dtype=torch.float64).T
        self.hyperparameters = self._prior_mean.clone()  # (A + 4,)

    def _kernel(self, log: Tensor, a: Tensor, b: Tensor) -> Tensor:
        lengths, (variation, signal) = log[: self.n_actions].exp(), log[self.n_actions :][:2].exp()
        return signal * torch.exp(-0.5 * squared_distances(a, b, lengths, variation))

    def _covariance(self, log: Tensor) -> Tensor:
        group, noise = log[-2:].exp()
        same = self._groups[:, None] == self._groups[None]
        diagonal = torch.eye(len(self._groups), dtype=torch.float64) * (noise + JITTER)
        return self._kernel(log, self._positions, self._positions) + group * same + diagonal

    def fit(self, raw: Tensor, groups: Tensor, returns: Tensor) -> None:
        """Raw actions (N, K, A), the number of each episode's group (N,), and returns (N,), all finite.

        Raises `JelError` if a return is not finite, or if there is nothing to fit.
        """
        if len(returns) < 2 or not bool(returns.isfinite().all()):
            raise JelError("the critic needs the finite returns of two episodes or more")
        y = self._take(raw, groups, returns)
        log = self.hyperparameters.clone().requires_grad_()
        adam = torch.optim.Adam([log], lr=0.1)
        for _ in range(self.steps):
            adam.zero_grad()
            self._minus_log_posterior(log, y).backward()
            adam.step()
        self.condition(log.detach(), raw, groups, returns)

    @torch.no_grad()
    def condition(self, hyperparameters: Tensor, raw: Tensor, groups: Tensor, returns: Tensor) -> None:
        """What `fit` ends with, for hyperparameters (A + 4,) that it has found before."""
        y = self._take(raw, groups, returns)
        self.hyperparameters = hyperparameters.clone()
        self._factor = torch.linalg.cholesky(self._covariance(self.hyperparameters))
        self._weights = torch.cholesky_solve(y, self._factor)

    def _take(self, raw: Tensor, groups: Tensor, returns: Tensor) -> Tensor:
        """Keep the episodes; their standardised returns, (N, 1)."""
        self._positions, self._groups = positions(raw), groups
        returns = returns.double()
        self._offset, self.unit = returns.mean(), returns.std().clamp_min(1e-9)
        return ((returns - self._offset) / self.unit)[:, None]

    def _minus_log_posterior(self, log: Tensor, y: Tensor) -> Tensor:
        factor = torch.linalg.cholesky(self._covariance(log))
        fit = 0.5 * (y * torch.cholesky_solve(y, factor)).sum() + factor.diagonal().log().sum()
        return fit + 0.5 * ((log - self._prior_mean).square() / self._prior_variance).sum()

    def returns(self, raw: Tensor, pessimism: float = 0.0) -> Tensor:
        """The expected return of actions (M, K, A) in a typical group, less `pessimism` standard deviations: (M,).

        Differentiable in the actions.
        """
        covariance = self._kernel(self.hyperparameters, positions(raw), self._positions)  # (M, N)
        mean = (covariance @ self._weights)[:, 0]
        if pessimism:
            explained = torch.linalg.solve_triangular(self._factor, covariance.T, upper=False).square().sum(0)
            signal = self.hyperparameters[self.n_actions + 1].exp()
            mean = mean - pessimism * (signal - explained).clamp_min(1e-9).sqrt()
        return mean * self.unit + self._offset
