"""The meta-training loop: groups of episodes -> policy updates (paper 3.5, 4.1)."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from jel.errors import JelError
from jel.knobs import Multipliers
from jel.learn.env import Env
from jel.learn.exploration import Exploration
from jel.learn.given_actions import given_actions
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

    def update(self, rollout: Rollout, number: int, of: int) -> Mapping[str, float | None]: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


@dataclass(frozen=True)
class Course:
    """How many groups there are, and what they are for."""

    updates: int  # groups in all
    compare: int  # of these, the last: they change nothing, and compare policies
    learnings: int  # of as many untrained policies, one after another, which share the groups before
    still: float  # a learning ends early when two updates in a row move the mean by less (nats a decision)

    def __post_init__(self) -> None:
        if self.compare >= self.updates:
            raise JelError(f"{self.compare} groups to compare leave none of {self.updates} to learn from")
        if not 1 <= self.learnings <= self.updates - self.compare:
            raise JelError(f"{self.updates - self.compare} groups are too few for {self.learnings} learnings")
        if self.learnings > 1 and not self.compare:
            raise JelError("several learnings need groups that compare their policies: compare 1 or more")

    def groups(self, learning: int) -> int:
        """Of a learning, numbered from 0: the first ones have one more if they cannot be equal."""
        each, more = divmod(self.updates - self.compare, self.learnings)
        return each + (learning < more)


class MetaTrainer:
    """Owns the loop's state: the policy, its update, and how many groups are done of those `planned`.

    `Course` says what the groups are for. A learning that stands still makes `planned` smaller.

    The last `compare` groups compare the policies that the updates before left, E in all, the last ones of each
    learning, each by one episode of its mean actions from the starts of the group. The one with the highest return
    stays.

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
        course: Course,
        rank: int = 0,
        world_size: int = 1,
        stop_requested: Callable[[], bool] = lambda: False,
    ):
        self.env, self.policy, self.updater, self.config, self.seed = env, policy, updater, config, seed
        self.course, self.planned = course, course.updates
        if course.compare and policy.observes != {"progress"}:
            raise JelError("policies that observe more than progress cannot be compared by given actions: compare 0")
        self.rank, self.world_size, self.stop_requested = rank, world_size, stop_requested
        self.updates = 0
        self._learning, self._learned, self._stood = 0, 0, 0  # which one, its groups, those that moved little at last
        self._begin = updater.state_dict()
        self._kept: dict[str, dict[str, Tensor]] = {}  # policies by the number of updates that made them
        self._returns = torch.zeros(0)  # of the kept policies so far, in their order

    def update(self) -> dict:
        """One group and one policy update; returns the record for the log (docs/log.md explains its keys)."""
        start, c, learning = time.perf_counter(), self.config, self._learning < self.course.learnings
        decisions, num_steps = self.env.decisions(self.updates), self.env.task.num_steps(self.updates)
        progress = [first / num_steps for first, _ in decisions]
        if learning:
            acting = self.policy
            generator = torch.Generator().manual_seed((self.seed + 1_000_003 * self.updates) % 2**63)  # one per group
            noise = c.exploration.noise((c.episodes, len(decisions), self.policy.n_actions), generator)
        else:
            acting, noise = given_actions(self.policy), self._mean_actions(progress)
        where = self.rank, self.world_size, self.stop_requested
        rollout = collect(self.env, acting, self.updates, noise, c.chunk, c.reward, *where)
        returns = self.updater.returns(rollout.rewards, rollout.alive, self.updater.gamma)[:, 0]  # (E,)
        if learning:
            stats = self.updater.update(rollout, self._learned, self.course.groups(self._learning))
            self._keep()
        else:
            stats = self._compared(returns)
        losses = rollout.probe_losses
        whole = rollout.alive.all(dim=1) & losses.isfinite().all(dim=1)
        final = losses[whole, -1]
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
        if learning:
            self._go_on(stats["approx_kl"])
        return record

    def _keep(self) -> None:
        """Remember the policy of this update; only the last ones of each learning matter."""
        if self.course.compare:
            self._kept[str(self.updates + 1)] = {name: t.clone() for name, t in self.policy.state_dict().items()}
            own = list(self._kept)[-self._learned - 1 :]  # of this learning
            for name in own[: -max(1, self.config.episodes // self.course.learnings)]:
                del self._kept[name]

    def _go_on(self, moved: float | None) -> None:
        """After a group that was learned from: does this learning go on, does another begin, or are all done?"""
        self._learned += 1
        self._stood = self._stood + 1 if moved is not None and moved < self.course.still else 0
        left = self.course.groups(self._learning) - self._learned
        if left and self._stood < 2:
            return
        self.planned -= left
        self._learning, self._learned, self._stood = self._learning + 1, 0, 0
        if self._learning < self.course.learnings:
            self.updater.load_state_dict(self._begin)
            seed = (self.seed + 7_368_787 * self._learning) % 2**63
            self.policy.load_state_dict(self.policy.untrained(seed).state_dict())

    def _mean_actions(self, progress: list[float]) -> Tensor:
        """What the kept policies would do, an episode each; where there are fewer, they come again: (E, K, A)."""
        states, means = torch.tensor(progress)[:, None], []
        other = copy.deepcopy(self.policy)
        for weights in self._kept.values():
            other.load_state_dict(weights)
            means.append(other(states)[0].detach())
        return torch.stack([means[i % len(means)] for i in range(self.config.episodes)])

    def _compared(self, returns: Tensor) -> dict[str, float]:
        n = len(self._kept)
        self._returns = returns[:n] + (self._returns if len(self._returns) else 0.0)
        name = list(self._kept)[int(self._returns.argmax())]
        self.policy.load_state_dict(self._kept[name])
        with torch.no_grad():
            entropy = self.policy.entropy(torch.zeros(1, len(self.policy.features))).mean().item()
        return {"entropy": entropy, "kept_update": float(name)}

    def state_dict(self) -> dict:
        """Nested dict of tensors and numbers: all that the next update depends on."""
        kept = {name: {key: t.clone() for key, t in weights.items()} for name, weights in self._kept.items()}
        where = torch.tensor([self.updates, self.planned, self._learning, self._learned, self._stood])
        return {"where": where, "kept": kept, "returns": self._returns.clone(), "updater": self.updater.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state_dict` was taken. Raises `JelError` if the policy network is another."""
        self.updater.load_state_dict(state["updater"])
        self.updates, self.planned, self._learning, self._learned, self._stood = state["where"].tolist()
        oldest_first = sorted(state.get("kept", {}).items(), key=lambda kept: int(kept[0]))  # files keep no order
        self._kept = {name: {key: t.clone() for key, t in weights.items()} for name, weights in oldest_first}
        self._returns = state["returns"].clone()


def columns(rows: list[Multipliers]) -> dict[str, dict[str, list[float]]]:
    """K decisions' multipliers -> {group: {hyperparameter: [K]}}."""
    return {group: {key: [float(row[group][key]) for row in rows] for key in rows[0][group]} for group in rows[0]}
