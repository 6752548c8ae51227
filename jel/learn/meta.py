"""The meta-training loop: groups of episodes -> policy updates (paper 3.5, 4.1)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from jel.knobs import Multipliers
from jel.learn.env import Env
from jel.learn.exploration import Exploration
from jel.learn.rollout import RewardConfig, Rollout, collect
from jel.policy import GaussianPolicy, multiplier_table


@dataclass(frozen=True)
class GroupConfig:
    """What a group of episodes is."""

    episodes: int  # per update
    chunk: int  # of them side by side on this device
    reward: RewardConfig
    exploration: Exploration = Exploration()


class Updater(Protocol):
    """What changes the policy after a group: `PolicyUpdate`, or `ActorCriticUpdate`."""

    returns: Callable[[Tensor, Tensor, float], Tensor]
    gamma: float

    def update(self, rollout: Rollout, number: int, of: int) -> dict[str, float]: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class MetaTrainer:
    """Owns the loop's state: the policy, its update, and how many updates are done `of` those planned.

    `update()` is all or nothing: interrupted half way (`Interrupted`), it leaves the state as it was, and the same
    group runs again, bit for bit, after a resume. Identical on all ranks.
    """

    def __init__(
        self,
        env: Env,
        policy: GaussianPolicy,
        updater: Updater,
        config: GroupConfig,
        seed: int,
        of: int,
        rank: int = 0,
        world_size: int = 1,
        stop_requested: Callable[[], bool] = lambda: False,
    ):
        self.env, self.policy, self.updater, self.config, self.seed = env, policy, updater, config, seed
        self.of = of
        self.rank, self.world_size, self.stop_requested = rank, world_size, stop_requested
        self.updates = 0

    def update(self) -> dict:
        """One group and one policy update; returns the record for the log (the README explains its keys)."""
        start, c = time.perf_counter(), self.config
        decisions, num_steps = self.env.decisions(self.updates), self.env.task.num_steps(self.updates)
        generator = torch.Generator().manual_seed((self.seed + 1_000_003 * self.updates) % 2**63)  # a stream per group
        noise = c.exploration.noise((c.episodes, len(decisions), self.policy.n_actions), generator)
        rollout = collect(
            self.env,
            self.policy,
            self.updates,
            noise,
            c.chunk,
            c.reward,
            self.rank,
            self.world_size,
            self.stop_requested,
        )
        stats = self.updater.update(rollout, self.updates, self.of)
        losses = rollout.probe_losses
        returns = self.updater.returns(rollout.rewards, rollout.alive, self.updater.gamma)[:, 0]  # (E,)
        whole = rollout.alive.all(dim=1) & losses.isfinite().all(dim=1)
        final = losses[whole, -1]
        progress = [first / num_steps for first, _ in decisions]
        record = {
            "step": self.updates,
            "return_mean": returns.mean().item(),
            "return_best": returns.max().item(),
            "returns": returns.tolist(),
            **stats,
            "decision_progress": progress,
            "multipliers": columns([row["multipliers"] for row in multiplier_table(self.policy, progress)])
            if self.policy.observes == {"progress"}
            else {},
            "probe_first": losses[0, 0].item(),
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


def columns(rows: list[Multipliers]) -> dict[str, dict[str, list[float]]]:
    """K decisions' multipliers -> {group: {hyperparameter: [K]}}."""
    return {group: {key: [float(row[group][key]) for row in rows] for key in rows[0][group]} for group in rows[0]}
