"""G episodes -> one Rollout. An episode is a truncated training run under sampled actions.

E episodes of the group, K decisions, S features, A knobs. A task trains some of the group's episodes side by side; a
group larger than that is run in chunks, and over several ranks each rank runs its share. What an episode does depends
on its index in the group alone, so ranks and chunks change nothing in the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from jel.learn.env import Env
from jel.learn.rewards import bounded_rewards
from jel.policy import GaussianPolicy


@dataclass(frozen=True)
class Rollout:
    """What one group of episodes leaves behind for the policy update; on the policy's device, the CPU."""

    states: Tensor  # (E, K, S)
    actions: Tensor  # (E, K, A) raw, before the tanh
    log_probs: Tensor  # (E, K) under the policy that sampled the actions
    rewards: Tensor  # (E, K)
    alive: Tensor  # (E, K) bool: False for the decisions after an episode has blown up
    probe_losses: Tensor  # (E, K + 1)


@dataclass(frozen=True)
class RewardConfig:
    """The reward of a decision (paper 3.4): see jel/learn/rewards.py."""

    gradient_penalty: float = 0.0  # lambda_g
    smoothness_penalty: float = 0.0  # lambda_s
    nan_penalty: float | None = None  # what an episode that blows up loses; None = its starting loss

    @property
    def measured(self) -> tuple[str, ...]:
        return ("probe_loss", "grad_norm") if self.gradient_penalty else ("probe_loss",)


class Interrupted(Exception):
    """The rollout was abandoned half way because a stop was requested; nothing has changed but the task."""


def collect(
    env: Env,
    policy: GaussianPolicy,
    group: int,
    noise: Tensor,
    chunk: int,
    reward: RewardConfig,
    rank: int = 0,
    world_size: int = 1,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Rollout:
    """Run the group's episodes, each decision taken by the policy at what it then observes.

    `noise` (E, K, A), standard normal: what is added to the mean action in units of the standard deviation. `chunk`:
    episodes side by side. Both are the same on all ranks. Raises `Interrupted` when `stop_requested()` (checked at
    every decision) says so.
    """
    E, K, A = noise.shape
    S = len(env.features)
    # one row an episode: S features, A actions, a log-density and a gradient norm for each decision, K + 1 probe losses
    record = torch.zeros(E, K * (S + A + 2) + K + 1)
    states, actions, log_probs, norms, losses = record.split([K * S, K * A, K, K, K + 1], dim=1)
    states, actions = states.unflatten(1, (K, S)), actions.unflatten(1, (K, A))
    share = -(-E // world_size)
    mine = range(min(rank * share, E), min((rank + 1) * share, E))
    # as many turns on a rank with fewer episodes: all stop at the same decision
    for first_episode in range(mine.start, mine.start + share, chunk):
        episodes = mine[first_episode - mine.start :][:chunk]
        rows = slice(episodes.start, episodes.stop)
        if episodes:
            state = env.reset(group, episodes)
            losses[rows, 0] = env.readings["probe_loss"]
        for k in range(K):
            if stop_requested():
                raise Interrupted
            if not episodes:
                continue
            states[rows, k] = state
            actions[rows, k], log_probs[rows, k] = policy.act(state, noise[rows, k])
            state = env.step(actions[rows, k])
            losses[rows, k + 1] = env.readings["probe_loss"]
            if reward.gradient_penalty:
                norms[rows, k] = env.readings["grad_norm"]
    if world_size > 1:
        record.copy_(_sum_over_ranks(record))
    rewards, alive = bounded_rewards(
        losses,
        actions,
        norms if reward.gradient_penalty else None,
        reward.gradient_penalty,
        reward.smoothness_penalty,
        reward.nan_penalty,
    )
    return Rollout(states, actions, log_probs, rewards, alive, losses)


def _sum_over_ranks(record: Tensor) -> Tensor:
    """Every rank filled its own rows and left the others 0."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    record = record.to(device)
    dist.all_reduce(record)
    return record.cpu()
