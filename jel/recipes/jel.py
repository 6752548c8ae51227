"""JEL assembled from its parts: progress, log-scale actions, group-relative policy gradients (paper 3).

A recipe is a set of choices and nothing more: what it chooses from lives in `jel.knobs`, `jel.features`, `jel.policy`
and `jel.learn`. The defaults are those of the paper's Table 2; `OURS` lists what our own recipe changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from jel.errors import JelError
from jel.knobs import Knob
from jel.learn.actor_critic import ActorCriticUpdate
from jel.learn.advantages import RETURNS, group_advantages, standard_grpo_advantages
from jel.learn.env import Env
from jel.learn.exploration import Exploration
from jel.learn.grpo import PolicyUpdate
from jel.learn.meta import Course, GroupConfig, MetaTrainer
from jel.learn.rollout import RewardConfig
from jel.learn.search import SEARCHES, SearchTrainer
from jel.policy import GaussianPolicy
from jel.tasks.base import Task

ADVANTAGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "group": group_advantages,
    "standard": standard_grpo_advantages,  # with GRPO's length and variance normalisation, the ablation of 4.4
}

# What the recipe `jel` changes in the paper's: corrections for some param groups around the shared multiplier of the
# learning rate, and momentum; no weight decay, which an episode is too short to feel; noise that hardly changes within
# an episode; and a critic of whole episodes.
OURS = {
    "corrections": "groups",
    "decay_range": 1.0,
    "momentum_range": 5.0,
    "noise_correlation": 0.98,
    "learner": "critic",
    "policy_lr": 1e-2,
}


@dataclass(frozen=True)
class JelRecipe:
    """The choices of JEL, by default those of the paper (Table 2)."""

    action_range: float = 100.0  # multipliers of the learning rate lie in [1 / this, this]
    decay_range: float = 100.0  # those of the weight decay; 1: it is not controlled
    # sets of param groups whose learning rate has a correction of its own, by the name of its knob
    corrections: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    correction_range: float = 10.0
    momentum_range: float = 1.0  # 1 - momentum (or beta1) is multiplied by a number in [1 / this, this]; 1: not at all
    features: tuple[str, ...] = ("progress",)
    hidden: int = 64
    initial_log_std: float = -0.5
    learner: str = "grpo"  # or "critic"
    policy_lr: float = 3e-4
    policy_lr_schedule: str = "constant"  # or "linear", to 0 at the last update
    updates: int = 50
    compare: int = 0  # of these, the last; this, learnings and still: see `Course`
    learnings: int = 1
    still: float = 0.0
    gamma: float = 0.99
    clip: float = 0.2
    epochs: int = 4
    minibatch_size: int = 64
    entropy_coef: float = 0.0
    final_log_std: float = -0.7  # the critic's part, down to the departure cost: see `ActorCriticUpdate`
    policy_steps: int = 120
    trust_region: float = 5.0
    pessimism: float = 1.0
    variation_cost: float = 2.0
    departure_cost: float = 0.03
    returns: str = "reward-to-go"
    advantages: str = "group"
    exploration: Exploration = Exploration()
    episodes: int = 8  # per update
    decision_interval: int = 50  # steps
    reward: RewardConfig = RewardConfig()

    def knobs(self) -> tuple[Knob, ...]:
        """One multiplier on every group's learning rate, one on its weight decay (3.3), corrections, and momentum: a
        range of 1 leaves weight decay or momentum out.

        A correction multiplies the shared learning rate, so that exploring takes few dimensions however many groups
        there are: groups without one follow the shared multiplier.
        """
        within = {}
        for name in ("action_range", "decay_range", "correction_range", "momentum_range"):
            value = getattr(self, name)
            if not 1 < value <= 1e6 and not (name in ("decay_range", "momentum_range") and value == 1):
                raise JelError(f"{name} is {value}; it must lie above 1, and be at most 1e6")
            within[name] = (1 / value, value)
        knobs = [Knob("lr", "lr", bounds=within["action_range"])]
        if self.decay_range > 1:
            knobs.append(Knob("weight_decay", "weight_decay", bounds=within["decay_range"]))
        for name, groups in self.corrections.items():
            knobs.append(Knob(name, "lr", tuple(groups), bounds=within["correction_range"]))
        if self.momentum_range > 1:
            knobs.append(Knob("momentum", "1-momentum", bounds=within["momentum_range"]))
        return tuple(knobs)

    def policy(self, seed: int) -> GaussianPolicy:
        return GaussianPolicy(self.knobs(), self.features, self.hidden, seed, self.initial_log_std)

    def env(self, task: Task, policy: GaussianPolicy) -> Env:
        return Env(task, policy.actions, policy.features, self.decision_interval, self.reward.measured)

    def updater(self, policy: GaussianPolicy, seed: int) -> PolicyUpdate | ActorCriticUpdate:
        if self.learner == "critic":
            return ActorCriticUpdate(
                policy,
                lr=self.policy_lr,
                steps=self.policy_steps,
                trust_region=self.trust_region,
                pessimism=self.pessimism,
                variation_cost=self.variation_cost,
                departure_cost=self.departure_cost,
                initial_log_std=self.initial_log_std,
                final_log_std=self.final_log_std,
                correlation=self.exploration.correlation,
                seed=seed,
            )
        return PolicyUpdate(
            policy,
            lr=self.policy_lr,
            lr_schedule=self.policy_lr_schedule,
            gamma=self.gamma,
            clip=self.clip,
            epochs=self.epochs,
            minibatch_size=self.minibatch_size,
            entropy_coef=self.entropy_coef,
            seed=seed,
            returns=RETURNS[self.returns],
            advantages=ADVANTAGES[self.advantages],
        )

    def trainer(
        self, task: Task, policy_seed: int, shuffle_seed: int, action_seed: int, chunk: int, **where: Any
    ) -> MetaTrainer:
        """The whole meta-training loop over `task`; `where`: rank, world_size and stop_requested of `MetaTrainer`."""
        policy = self.policy(policy_seed)
        config = GroupConfig(self.episodes, chunk, self.reward, self.exploration)
        updater = self.updater(policy, shuffle_seed)
        course = Course(self.updates, self.compare, self.learnings, self.still)
        return MetaTrainer(self.env(task, policy), policy, updater, config, action_seed, course, **where)

    def searcher(self, method: str, task: Task, seed: int, chunk: int, **where: Any) -> SearchTrainer:
        """A search of `SEARCHES` over the same knobs and episodes, constants instead of a learned schedule.

        `where`: as for `trainer`, and `shared`, the file of results that several processes share.
        """
        policy, config = self.policy(seed), GroupConfig(self.episodes, chunk, self.reward, self.exploration)
        make = lambda: SEARCHES[method](policy.n_actions, self.episodes, self.updates, seed)
        return SearchTrainer(self.env(task, policy), policy, make, config, self.updates, **where)
