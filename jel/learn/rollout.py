"""G episodes -> one Rollout. An episode is a truncated training run under sampled actions.

E episodes of the group, K decisions, S state size, A actions. A task trains some of the group's episodes side by side;
a group larger than that is run in chunks, and over several ranks each rank runs its share. What an episode does depends
on its index in the group alone, so ranks and chunks change nothing in the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from jel.actions import multipliers, scales_from_actions
from jel.learn.grpo import Rollout
from jel.learn.rewards import bounded_rewards
from jel.policy import GaussianPolicy


class EpisodeTask(Protocol):
    """Training runs that can be started again and again: what the controller is meta-trained on."""

    num_steps: int  # T, steps of an episode

    def reset(self, group: int, episodes: range) -> None:
        """Start these episodes of group number `group` from random initialisation (e of them side by side)."""

    def train(self, first_step: int, steps: int, factors: dict[str, Tensor]) -> None:
        """Train steps first_step, ..., first_step + steps - 1 under the multipliers, a tensor (e,) per hyperparameter."""

    def probe_loss(self) -> Tensor:
        """Mean loss over the fixed probe batches: (e,), non-finite for an episode that has blown up."""

    def grad_norm(self) -> Tensor:
        """Global gradient norm of the last step: (e,). Asked for only with a gradient penalty."""


class Interrupted(Exception):
    """The rollout was abandoned half way because a stop was requested; nothing has changed but the task."""


def decision_steps(num_steps: int, interval: int) -> list[tuple[int, int]]:
    """(first step, steps) of each decision: every `interval` steps, the last interval shorter if it must be."""
    return [(first, min(interval, num_steps - first)) for first in range(0, num_steps, interval)]


def collect(
    task: EpisodeTask,
    policy: GaussianPolicy,
    group: int,
    episodes: int,
    chunk: int,
    interval: int,
    generator: torch.Generator,
    lambda_g: float,
    lambda_s: float,
    nan_penalty: float | None,
    rank: int = 0,
    world_size: int = 1,
    stop_requested: Callable[[], bool] = lambda: False,
) -> tuple[Rollout, Tensor]:
    """Run the group's episodes under actions sampled from the policy -> (rollout, probe losses (E, K + 1)).

    `chunk`: episodes side by side. It and the state of `generator` must be the same on all ranks. Raises `Interrupted` when
    `stop_requested()` (checked at every decision) says so.
    """
    decisions = decision_steps(task.num_steps, interval)
    noise = torch.randn(episodes, len(decisions), policy.n_actions, generator=generator)  # (E, K, A)
    states = torch.tensor([[first / task.num_steps] for first, _ in decisions]).expand(episodes, -1, 1)  # (E, K, 1)
    with torch.no_grad():
        actions, log_probs = policy.act(states, noise)  # (E, K, A), (E, K)
    scales = scales_from_actions(actions, policy.action_range)

    readings = torch.zeros(episodes, 2 * len(decisions) + 1)  # K + 1 losses, K norms
    share = -(-episodes // world_size)
    mine = range(min(rank * share, episodes), min((rank + 1) * share, episodes))
    for first_episode in range(
        mine.start, mine.start + share, chunk
    ):  # as often on a rank with fewer: they stop together
        those = mine[first_episode - mine.start :][:chunk]
        rows = slice(those.start, those.stop)
        if those:
            task.reset(group, those)
            readings[rows, 0] = task.probe_loss().cpu()
        for k, (first_step, steps) in enumerate(decisions):
            if stop_requested():
                raise Interrupted
            if not those:
                continue
            task.train(first_step, steps, multipliers(scales[rows, k]))
            readings[rows, k + 1] = task.probe_loss().cpu()
            if lambda_g:
                readings[rows, len(decisions) + 1 + k] = task.grad_norm().cpu()
    if world_size > 1:
        readings = _sum_over_ranks(readings)
    probe_losses, norms = readings[:, : len(decisions) + 1], readings[:, len(decisions) + 1 :]
    rewards, alive = bounded_rewards(
        probe_losses, actions, norms if lambda_g else None, lambda_g, lambda_s, nan_penalty
    )
    return Rollout(states, actions, log_probs, rewards, alive), probe_losses


def _sum_over_ranks(readings: Tensor) -> Tensor:
    """Every rank filled its own rows and left the others 0."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    readings = readings.to(device)
    dist.all_reduce(readings)
    return readings.cpu()
