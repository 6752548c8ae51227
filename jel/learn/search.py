"""Search without gradients over the very same knobs, episodes and price: the control for what is learned.

A searcher proposes constants: one raw action a knob, held for the whole episode. E episodes of a group, K decisions,
A knobs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from jel.errors import JelError
from jel.learn.env import Env
from jel.learn.meta import GroupConfig, columns
from jel.learn.rollout import collect
from jel.policy import GaussianPolicy, multiplier_table


class Searcher(Protocol):
    """Proposes E candidates a group and learns what they returned; deterministic in its seed and those returns."""

    def ask(self) -> Tensor:
        """(E, A) raw actions to try."""

    def tell(self, raw: Tensor, returns: Tensor) -> None:
        """What they returned, (E,): larger is better, -inf for an episode that blew up."""

    def best(self) -> Tensor:
        """(A,) the raw action that the search would deploy now."""


class RandomSearch:
    """Independent draws whose multipliers are uniform over the bounds on the knobs' scale; the best one is deployed."""

    def __init__(self, n_actions: int, episodes: int, seed: int):
        self.shape, self.generator = (episodes, n_actions), torch.Generator().manual_seed(seed)
        self._best, self._return = torch.zeros(n_actions), -float("inf")

    def ask(self) -> Tensor:
        return torch.atanh((2 * torch.rand(self.shape, generator=self.generator) - 1).clamp(-0.999, 0.999))

    def tell(self, raw: Tensor, returns: Tensor) -> None:
        i = int(returns.argmax())
        if returns[i] > self._return:
            self._best, self._return = raw[i], float(returns[i])

    def best(self) -> Tensor:
        return self._best


class CmaSearch:
    """CMA-ES (Hansen) with a population of E, from multipliers of 1 and the policy's initial spread; needs `cmaes`.

    What is deployed is the mean of its distribution. Raises `JelError` if the package is not installed.
    """

    def __init__(self, n_actions: int, episodes: int, seed: int, sigma: float = 0.61):
        try:
            import cmaes
            import numpy as np
        except ImportError:
            raise JelError("--method cma needs the package cmaes: pip install 'just-enough-learning[search]'") from None
        self._zeros = np.zeros(n_actions)
        self._cma = cmaes.CMA(mean=self._zeros, sigma=sigma, seed=seed % 2**32, population_size=episodes)

    def ask(self) -> Tensor:
        return torch.stack([torch.from_numpy(self._cma.ask()) for _ in range(self._cma.population_size)]).float()

    def tell(self, raw: Tensor, returns: Tensor) -> None:
        worst = returns[returns.isfinite()].min() if returns.isfinite().any() else torch.tensor(0.0)
        losses = -torch.where(returns.isfinite(), returns, worst - 1)
        self._cma.tell([(x.double().numpy(), float(loss)) for x, loss in zip(raw, losses)])

    def best(self) -> Tensor:
        return torch.from_numpy(self._cma.mean.copy()).float()


SEARCHES: dict[str, Callable[[int, int, int], Searcher]] = {"random": RandomSearch, "cma": CmaSearch}


def set_constant(policy: GaussianPolicy, raw: Tensor, log_std: float = 0.0) -> None:
    """Make the policy's mean action `raw` (A,) everywhere, and its log standard deviation `log_std`."""
    last, n = policy.net[-1], policy.n_actions
    assert isinstance(last, torch.nn.Linear)
    with torch.no_grad():
        last.weight.zero_()
        last.bias[:n], last.bias[n:] = raw, log_std


class SearchTrainer:
    """`MetaTrainer`'s twin around a searcher: the same groups of episodes, records, state, and a policy in the end."""

    def __init__(
        self,
        env: Env,
        policy: GaussianPolicy,
        make_searcher: Callable[[], Searcher],
        config: GroupConfig,
        rank: int = 0,
        world_size: int = 1,
        stop_requested: Callable[[], bool] = lambda: False,
    ):
        self.env, self.policy, self.make_searcher, self.config = env, policy, make_searcher, config
        self.rank, self.world_size, self.stop_requested = rank, world_size, stop_requested
        self.searcher, self.updates = make_searcher(), 0
        self._raw: list[Tensor] = []
        self._returns: list[Tensor] = []
        self._unit = GaussianPolicy(policy.knobs, policy.features)  # mean 0, standard deviation 1: noise is the action
        set_constant(self._unit, torch.zeros(policy.n_actions))

    def update(self) -> dict:
        """One group of candidates; returns the record for the log."""
        start, c = time.perf_counter(), self.config
        decisions, num_steps = self.env.decisions(self.updates), self.env.task.num_steps(self.updates)
        raw = self.searcher.ask()
        noise = raw[:, None].expand(-1, len(decisions), -1).contiguous()
        where = self.rank, self.world_size, self.stop_requested
        try:
            rollout = collect(self.env, self._unit, self.updates, noise, c.chunk, c.reward, *where)
        except BaseException:
            self._replay()  # the question was not answered: it is asked again
            raise
        losses = rollout.probe_losses
        whole = rollout.alive.all(dim=1) & losses.isfinite().all(dim=1)
        returns = torch.where(whole, rollout.rewards.sum(1), -float("inf"))
        self._hear(raw, returns)
        progress = [first / num_steps for first, _ in decisions]
        finite = returns[whole]
        record = {
            "step": self.updates,
            "return_mean": finite.mean().item() if len(finite) else None,
            "return_best": finite.max().item() if len(finite) else None,
            "returns": [r if r > -float("inf") else None for r in returns.tolist()],
            "entropy": 0.0,
            "decision_progress": progress,
            "multipliers": columns([row["multipliers"] for row in multiplier_table(self.policy, progress)]),
            "probe_first": losses[0, 0].item(),
            "probe_last": losses[whole, -1].mean().item() if whole.any() else None,
            "episodes_alive": int(whole.sum()),
            "seconds": time.perf_counter() - start,
        }
        self.updates += 1
        return record

    def state_dict(self) -> dict:
        """What was asked and answered: the searcher is rebuilt by telling it again."""
        E, A = self.config.episodes, self.policy.n_actions
        raw = torch.stack(self._raw) if self._raw else torch.zeros(0, E, A)
        return {"raw": raw, "returns": torch.stack(self._returns) if self._returns else torch.zeros(0, E)}

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state_dict` was taken. Raises `JelError` if it is another search's."""
        raw, returns = state["raw"], state["returns"]
        expected = (len(raw), self.config.episodes, self.policy.n_actions)
        if tuple(raw.shape) != expected or tuple(returns.shape) != expected[:2]:
            raise JelError("the saved search has other sizes; resume with the same episodes and knobs")
        self._raw, self._returns = list(raw), list(returns)
        self._replay()

    def _hear(self, raw: Tensor, returns: Tensor) -> None:
        self.searcher.tell(raw, returns)
        self._raw.append(raw)
        self._returns.append(returns)
        set_constant(self.policy, self.searcher.best())

    def _replay(self) -> None:
        history = list(zip(self._raw, self._returns))
        self.searcher, self._raw, self._returns, self.updates = self.make_searcher(), [], [], len(history)
        for raw, returns in history:
            asked = self.searcher.ask()
            if not torch.allclose(asked, raw, atol=1e-4):
                raise JelError("the saved search asked other questions; resume with the same seed and method")
            self._hear(raw, returns)
