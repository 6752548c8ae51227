"""The meta-training loop: groups of episodes -> policy updates (paper 3.5, 4.1)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from jel.learn.grpo import PolicyUpdate, discounted_returns
from jel.learn.rollout import EpisodeTask, collect, decision_steps
from jel.policy import GaussianPolicy, multiplier_table


@dataclass(frozen=True)
class MetaConfig:
    """What a group of episodes is (names as in the paper's Table 2 where it has them)."""

    episodes: int  # per update
    chunk: int  # of them side by side on this device
    decision_interval: int  # steps
    lambda_g: float  # gradient penalty
    lambda_s: float  # smoothness penalty
    nan_penalty: float | None  # reward of a blow-up, negated; None = the episode's starting loss


class MetaTrainer:
    """Owns the loop's state: the policy, its update, how many updates are done, and the seconds they took.

    `update()` is all or nothing: interrupted half way (`Interrupted`), it leaves the state as it was, and the same
    group runs again, bit for bit, after a resume. Identical on all ranks.
    """

    def __init__(
        self,
        task: EpisodeTask,
        policy: GaussianPolicy,
        updater: PolicyUpdate,
        config: MetaConfig,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        stop_requested: Callable[[], bool] = lambda: False,
    ):
        self.task, self.policy, self.updater, self.config, self.seed = task, policy, updater, config, seed
        self.rank, self.world_size, self.stop_requested = rank, world_size, stop_requested
        self.progress = [
            first / task.num_steps for first, _ in decision_steps(task.num_steps, config.decision_interval)
        ]
        self.updates = 0

    def update(self) -> dict:
        """One group and one policy update; returns the record for the log (see README, "what is logged")."""
        start, c = time.perf_counter(), self.config
        generator = torch.Generator().manual_seed((self.seed + 1_000_003 * self.updates) % 2**63)  # a stream per group
        rollout, probe_losses = collect(
            self.task,
            self.policy,
            self.updates,
            c.episodes,
            c.chunk,
            c.decision_interval,
            generator,
            c.lambda_g,
            c.lambda_s,
            c.nan_penalty,
            self.rank,
            self.world_size,
            self.stop_requested,
        )
        stats = self.updater.update(rollout)
        returns = discounted_returns(rollout.rewards, self.updater.gamma, rollout.alive)[:, 0]  # (E,)
        table = multiplier_table(self.policy, self.progress)
        whole = rollout.alive.all(dim=1) & probe_losses.isfinite().all(dim=1)
        final = probe_losses[whole, -1]
        record = {
            "step": self.updates,
            "return_mean": returns.mean().item(),
            "return_best": returns.max().item(),
            "returns": returns.tolist(),
            **stats,
            "decision_progress": self.progress,
            "lr": [row["lr"] for row in table],
            "weight_decay": [row["weight_decay"] for row in table],
            "probe_first": probe_losses[0, 0].item(),
            "probe_last": final.mean().item() if len(final) else None,
            "episodes_alive": int(whole.sum()),
            "seconds": time.perf_counter() - start,
        }
        self.updates += 1
        return record

    def state_dict(self) -> dict:
        """Nested dict of tensors and numbers: all that the next update depends on."""
        return {"updates": self.updates, "updater": self.updater.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state_dict` was taken. Raises `JelError` if the policy network is another."""
        self.updater.load_state_dict(state["updater"])
        self.updates = int(state["updates"])
