"""JEL assembled from its parts: progress, log-scale actions, group-relative policy gradients (paper 3).

`paper` is the recipe of the paper's Table 2. A recipe is a set of choices and nothing more: what it chooses from lives
in `jel.knobs`, `jel.features`, `jel.policy` and `jel.learn`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from jel.errors import JelError
from jel.knobs import Knob
from jel.learn.advantages import discounted_returns, group_advantages, standard_grpo_advantages
from jel.learn.env import Env
from jel.learn.grpo import PolicyUpdate
from jel.learn.meta import GroupConfig, MetaTrainer
from jel.learn.rollout import RewardConfig
from jel.policy import GaussianPolicy
from jel.tasks.base import Task

ADVANTAGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "group": group_advantages,
    "standard": standard_grpo_advantages,  # with GRPO's length and variance normalisation, the ablation of 4.4
}


@dataclass(frozen=True)
class JelRecipe:
    """The choices of JEL, by default those of the paper (Table 2)."""

    action_range: float = 100.0  # multipliers lie in [1 / this, this]
    features: tuple[str, ...] = ("progress",)
    hidden: int = 64
    initial_log_std: float = -0.5
    policy_lr: float = 3e-4
    gamma: float = 0.99
    clip: float = 0.2
    epochs: int = 4
    minibatch_size: int = 64
    entropy_coef: float = 0.0
    advantages: str = "group"
    episodes: int = 8  # per update
    decision_interval: int = 50  # steps
    reward: RewardConfig = RewardConfig()

    def knobs(self) -> tuple[Knob, ...]:
        """One multiplier on every group's learning rate, one on its weight decay (3.3)."""
        if not 1 < self.action_range <= 1e6:
            raise JelError(f"action_range is {self.action_range}; it must lie above 1, and be at most 1e6")
        bounds = (1 / self.action_range, self.action_range)
        return Knob("lr", "lr", bounds=bounds), Knob("weight_decay", "weight_decay", bounds=bounds)

    def policy(self, seed: int) -> GaussianPolicy:
        return GaussianPolicy(self.knobs(), self.features, self.hidden, seed, self.initial_log_std)

    def env(self, task: Task, policy: GaussianPolicy) -> Env:
        return Env(task, policy.actions, policy.features, self.decision_interval, self.reward.measured)

    def updater(self, policy: GaussianPolicy, seed: int) -> PolicyUpdate:
        return PolicyUpdate(
            policy,
            lr=self.policy_lr,
            gamma=self.gamma,
            clip=self.clip,
            epochs=self.epochs,
            minibatch_size=self.minibatch_size,
            entropy_coef=self.entropy_coef,
            seed=seed,
            returns=discounted_returns,
            advantages=ADVANTAGES[self.advantages],
        )

    def trainer(
        self, task: Task, policy_seed: int, shuffle_seed: int, action_seed: int, chunk: int, **where: Any
    ) -> MetaTrainer:
        """The whole meta-training loop over `task`; `where`: rank, world_size and stop_requested of `MetaTrainer`."""
        policy = self.policy(policy_seed)
        config = GroupConfig(self.episodes, chunk, self.reward)
        return MetaTrainer(
            self.env(task, policy), policy, self.updater(policy, shuffle_seed), config, action_seed, **where
        )
