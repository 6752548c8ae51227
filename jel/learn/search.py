"""Search without gradients over the very same knobs, episodes and price: the control for what is learned.

A searcher proposes constants: one raw action a knob, held for the whole episode. E episodes of a group, K decisions,
A knobs, n candidates of a question: E whole episodes, or more shorter ones at the same price.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from jel.errors import JelError
from jel.learn.env import Env
from jel.learn.given_actions import given_actions, set_constant
from jel.learn.halving import HalvingSearch
from jel.learn.meta import GroupConfig, columns
from jel.learn.rollout import collect
from jel.learn.shared_results import Finding, SharedResults
from jel.policy import GaussianPolicy, multiplier_table


class Searcher(Protocol):
    """Proposes candidates and learns what they returned; deterministic in its seed and those returns."""

    def ask(self, ends: Sequence[int]) -> tuple[Tensor, int]:
        """(n, A) raw actions to try, and for how many of the episode's decisions.

        `ends` (K,): the steps done after each decision. All that is asked costs at most E whole episodes.
        """

    def tell(self, raw: Tensor, returns: Tensor) -> None:
        """What they returned, (n,): larger is better, -inf for an episode that blew up."""

    def hear(self, found: Finding) -> None:
        """What another process found."""

    def best(self) -> Tensor:
        """(A,) the raw action that the search would deploy now."""


class RandomSearch:
    """Independent draws whose multipliers are uniform over the bounds on the knobs' scale; the best one is deployed."""

    def __init__(self, n_actions: int, episodes: int, updates: int, seed: int):
        self.shape, self.generator = (episodes, n_actions), torch.Generator().manual_seed(seed)
        self._best, self._return = torch.zeros(n_actions), -float("inf")

    def ask(self, ends: Sequence[int]) -> tuple[Tensor, int]:
        raw = torch.atanh((2 * torch.rand(self.shape, generator=self.generator) - 1).clamp(-0.999, 0.999))
        return raw, len(ends)

    def tell(self, raw: Tensor, returns: Tensor) -> None:
        i = int(returns.argmax())
        if returns[i] > self._return:
            self._best, self._return = raw[i], float(returns[i])

    def hear(self, found: Finding) -> None:
        if found.whole and found.value > self._return:
            self._best, self._return = found.raw, found.value

    def best(self) -> Tensor:
        return self._best


class CmaSearch:
    """CMA-ES (Hansen) with a population of E, from multipliers of 1 and the policy's initial spread; needs `cmaes`.

    What is deployed is the mean of its distribution. Raises `JelError` if the package is not installed.
    """

    def __init__(self, n_actions: int, episodes: int, updates: int, seed: int, sigma: float = 0.61):
        try:
            import cmaes
            import numpy as np
        except ImportError:
            raise JelError("--method cma needs the package cmaes: pip install 'just-enough-learning[search]'") from None
        self._zeros = np.zeros(n_actions)
        self._cma = cmaes.CMA(mean=self._zeros, sigma=sigma, seed=seed % 2**32, population_size=episodes)

    def ask(self, ends: Sequence[int]) -> tuple[Tensor, int]:
        raw = torch.stack([torch.from_numpy(self._cma.ask()) for _ in range(self._cma.population_size)]).float()
        return raw, len(ends)

    def tell(self, raw: Tensor, returns: Tensor) -> None:
        worst = returns[returns.isfinite()].min() if returns.isfinite().any() else torch.tensor(0.0)
        losses = -torch.where(returns.isfinite(), returns, worst - 1)
        self._cma.tell([(x.double().numpy(), float(loss)) for x, loss in zip(raw, losses)])

    def hear(self, found: Finding) -> None:
        """A population knows only its own."""

    def best(self) -> Tensor:
        return torch.from_numpy(self._cma.mean.copy()).float()


SEARCHES: dict[str, Callable[[int, int, int, int], Searcher]] = {  # of (knobs, episodes a group, groups, seed)
    "random": RandomSearch,
    "cma": CmaSearch,
    "halving": HalvingSearch,
}


class SearchTrainer:
    """`MetaTrainer`'s twin around a searcher: as many groups of episodes, records, state, and a policy in the end.

    `shared`: where several processes, on as many machines, tell each other what they found.
    """

    def __init__(
        self,
        env: Env,
        policy: GaussianPolicy,
        make_searcher: Callable[[], Searcher],
        config: GroupConfig,
        planned: int,
        rank: int = 0,
        world_size: int = 1,
        stop_requested: Callable[[], bool] = lambda: False,
        shared: SharedResults | None = None,
    ):
        if shared and world_size > 1:
            raise JelError("a search that is shared runs in single processes; start several without torchrun")
        self.env, self.policy, self.make_searcher, self.config = env, policy, make_searcher, config
        self.planned = planned
        self.rank, self.world_size, self.stop_requested, self.shared = rank, world_size, stop_requested, shared
        self.searcher, self.updates = make_searcher(), 0
        self._told: list[tuple[Tensor, int, Tensor]] = []  # an update's (n, A) raw actions, decisions, (n,) returns
        self._heard: list[tuple[int, Finding]] = []  # and before which update
        self._unit = given_actions(policy)

    def update(self) -> dict:
        """One question, at the price of a group; returns the record for the log."""
        start, c = time.perf_counter(), self.config
        decisions, num_steps = self.env.decisions(self.updates), self.env.task.num_steps(self.updates)
        if self.shared:
            for found in self.shared.news():
                self._heard.append((self.updates, found))
                self.searcher.hear(found)
        raw, asked = self.searcher.ask(self._ends(self.updates))
        noise = raw[:, None].expand(-1, asked, -1).contiguous()
        where = self.rank, self.world_size, self.stop_requested
        try:
            rollout = collect(self.env, self._unit, self.updates, noise, c.chunk, c.reward, *where)
        except BaseException:
            self._replay()  # the question was not answered: it is asked again
            raise
        losses = rollout.probe_losses
        whole = rollout.alive.all(dim=1) & losses.isfinite().all(dim=1)
        returns = torch.where(whole, rollout.rewards.sum(1), -float("inf"))
        self._tell(raw, asked, returns)
        if self.shared:
            self.shared.publish(self.updates, raw, returns, asked, asked == len(decisions))
        progress = [first / num_steps for first, _ in decisions]
        finite = returns[whole]
        record = {
            "step": self.updates,
            "return_mean": finite.mean().item() if len(finite) else None,
            "return_best": finite.max().item() if len(finite) else None,
            "returns": [r if r > -float("inf") else None for r in returns.tolist()],
            "entropy": 0.0,
            "decision_progress": progress,
            "decisions": asked,
            "multipliers": columns([row["multipliers"] for row in multiplier_table(self.policy, progress)]),
            "probe_first": losses[0, 0].item(),
            "probe_last": losses[whole, -1].mean().item() if whole.any() else None,
            "episodes_alive": int(whole.sum()),
            "seconds": time.perf_counter() - start,
        }
        self.updates += 1
        return record

    def trained(self) -> tuple[int, int]:
        """(steps, readings of the probe loss) of all episodes together: what the search has really cost."""
        steps = sum(len(raw) * self._ends(u)[asked - 1] for u, (raw, asked, _) in enumerate(self._told))
        return steps, sum(len(raw) * (asked + 1) for raw, asked, _ in self._told)

    def state_dict(self) -> dict:
        """What was asked, answered and heard: the searcher is rebuilt by telling it again."""
        A = self.policy.n_actions
        heard = [torch.cat([found.raw, torch.tensor(found[1:])]) for _, found in self._heard]
        return {
            "raw": torch.cat([torch.zeros(0, A), *(raw for raw, _, _ in self._told)]),
            "returns": torch.cat([torch.zeros(0), *(returns for _, _, returns in self._told)]),
            "sizes": torch.tensor([[len(raw), asked] for raw, asked, _ in self._told], dtype=torch.long).view(-1, 2),
            "heard": torch.stack(heard) if heard else torch.zeros(0, A + 3),
            "known": self.shared.known if self.shared else 0,
            "heard_before": torch.tensor([update for update, _ in self._heard], dtype=torch.long),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state_dict` was taken. Raises `JelError` if it is another search's."""
        A, sizes = self.policy.n_actions, state["sizes"]
        n = int(sizes[:, 0].sum())
        if tuple(state["raw"].shape) != (n, A) or tuple(state["returns"].shape) != (n,):
            raise JelError("the saved search has other sizes; resume with the same episodes and knobs")
        each = sizes[:, 0].tolist()
        parts = zip(state["raw"].split(each), sizes[:, 1].tolist(), state["returns"].split(each))
        self._told = list(parts) if each else []
        self._heard = [
            (update, Finding(row[:A], row[A].item(), int(row[A + 1]), bool(row[A + 2])))
            for update, row in zip(state["heard_before"].tolist(), state["heard"])
        ]
        if self.shared:
            self.shared.known = int(state["known"])
        self._replay()

    def _ends(self, update: int) -> list[int]:
        return list(accumulate(steps for _, steps in self.env.decisions(update)))

    def _tell(self, raw: Tensor, asked: int, returns: Tensor) -> None:
        self.searcher.tell(raw, returns)
        self._told.append((raw, asked, returns))
        set_constant(self.policy, self.searcher.best())

    def _replay(self) -> None:
        history, self._told, self.searcher, self.updates = self._told, [], self.make_searcher(), 0
        for update in range(len(history) + 1):
            for before, found in self._heard:
                if before == update:
                    self.searcher.hear(found)
            if update == len(history):
                return
            raw, asked, returns = history[update]
            question, decisions = self.searcher.ask(self._ends(update))
            if question.shape != raw.shape or decisions != asked or not torch.allclose(question, raw, atol=1e-4):
                raise JelError("the saved search asked other questions; resume with the same seed and method")
            self._tell(raw, asked, returns)
            self.updates += 1
