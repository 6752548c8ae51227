"""Proximal policy optimisation for a recurrent policy with a privileged value function.

Shapes: K decisions, E episodes, F features, Q privileged values, H heads.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jel.errors import JelError
from jel.learn.control import Trajectories
from jel.learn.grpo import clipped_policy_loss
from jel.policy_lstm import LstmPolicy, Trunk, initialise


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates (Schulman et al., arXiv 1506.02438) of whole episodes, each (K, E).

    `values[k]` is the value before decision k; after the last decision it is 0.
    """
    advantages = torch.zeros_like(rewards)
    following, value = torch.zeros_like(rewards[0]), torch.zeros_like(rewards[0])
    for k in reversed(range(len(rewards))):
        delta = rewards[k] + gamma * value - values[k]
        advantages[k] = following = delta + gamma * lam * following
        value = values[k]
    return advantages


class ValueNetwork(nn.Module):
    """Features and what only training knows -> the return to come: (K, E, F + Q) -> (K, E)."""

    def __init__(self, inputs: int, hidden: int, recurrent: bool, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.trunk = Trunk(inputs, hidden, recurrent)
            self.head = nn.Linear(hidden, 1)
        initialise(self, torch.Generator().manual_seed(seed))

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.trunk(x, self.trunk.initial_state(x.shape[1:-1]))
        return self.head(hidden)[..., 0]


@dataclass(frozen=True)
class PPOConfig:
    lr: float = 1e-3
    clip: float = 0.2
    entropy_coef: float = 0.01
    value_coef: float = 0.5
    epochs: int = 4
    minibatches: int = 4
    gamma: float = 1.0
    lam: float = 0.95
    max_grad_norm: float = 5.0
    polyak: float = 0.99
    critic: bool = True  # False: the mean return of the group's episodes is the baseline
    privileged: bool = True  # False: the value function sees what the policy sees


class PPO:
    """Owns policy, value function, their Adam and the averaged actor. `update` learns from one batch of episodes."""

    def __init__(self, policy: LstmPolicy, privileged: int, config: PPOConfig, seed: int):
        self.policy, self.config = policy, config
        extra = privileged if config.privileged else 0
        self.value = ValueNetwork(policy.n_features + extra, policy.hidden, policy.recurrent, seed + 1)
        self.averaged = copy.deepcopy(policy).requires_grad_(False)
        self.parameters = [*policy.parameters(), *self.value.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.lr)
        self.generator = torch.Generator().manual_seed(seed)
        self.updates = 0

    def _seen(self, t: Trajectories) -> Tensor:
        return torch.cat([t.features, t.privileged], -1) if self.config.privileged else t.features

    def update(self, t: Trajectories, returns: Tensor, groups: Sequence[int], lr_factor: float = 1.0) -> dict:
        """Learn from episodes whose return `returns` (E,) came at their end; `groups` (E,): the number of each one's.

        A group has one task and one seed; advantages are centred within it, so that neither counts. Raises `JelError`
        if a return is not finite.
        """
        if not bool(returns.isfinite().all()):
            raise JelError("a return is not finite: rewards must be clipped")
        c = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = c.lr * lr_factor
        self.policy.trunk.norm.update(t.features)
        self.value.trunk.norm.update(self._seen(t))
        rewards = torch.zeros_like(t.log_probs)
        rewards[-1] = returns
        with torch.no_grad():
            values = self.value(self._seen(t)) if c.critic else group_mean(returns, groups).expand_as(rewards)
            advantages = gae(rewards, values, c.gamma, c.lam if c.critic else 1.0)
            targets = advantages + values
            advantages = advantages - group_mean(advantages, groups)
            scaled = (advantages - advantages.mean()) / (advantages.std() + 1e-6)
            # under the normaliser of now, so that the ratio starts at 1
            old, _ = self.policy.evaluate(t.features, t.choices)
        seen, e, losses = self._seen(t), t.features.shape[1], []
        for _ in range(c.epochs):
            for at in torch.randperm(e, generator=self.generator).chunk(c.minibatches):
                log_probs, entropy = self.policy.evaluate(t.features[:, at], t.choices[:, at])
                actor = clipped_policy_loss(log_probs.flatten(), old[:, at].flatten(), scaled[:, at].flatten(), c.clip)
                critic = (self.value(seen[:, at]) - targets[:, at]).square().mean() if c.critic else 0.0
                loss = actor - c.entropy_coef * entropy.mean() + c.value_coef * critic
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters, c.max_grad_norm)
                self.optimizer.step()
                losses.append(torch.stack([actor, torch.as_tensor(critic), entropy.mean()]).tolist())
        self._average()
        self.updates += 1
        actor, critic, entropy = (sum(x) / len(losses) for x in zip(*losses))
        with torch.no_grad():
            log_ratio = self.policy.evaluate(t.features, t.choices)[0] - old
        explained = 1 - float((targets - values).var() / targets.var().clamp_min(1e-9))
        kl = float((log_ratio.exp() - 1 - log_ratio).mean())
        return {"actor": actor, "critic": critic, "entropy": entropy, "kl": kl, "explained": explained}

    @torch.no_grad()
    def _average(self) -> None:
        weight = max(1 - self.config.polyak, 1 / (self.updates + 1))
        for average, parameter in zip(self.averaged.parameters(), self.policy.parameters()):
            average.lerp_(parameter, weight)
        for held, buffer in zip(self.averaged.buffers(), self.policy.buffers()):
            held.copy_(buffer)

    def state_dict(self) -> dict:
        """All that the next update depends on: nested dicts with string keys, tensors and numbers at the leaves."""
        modules = {"policy": self.policy, "value": self.value, "averaged": self.averaged}
        return {
            **{name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in modules.items()},
            "adam": {
                str(i): {k: v.clone() for k, v in self.optimizer.state[p].items()}
                for i, p in enumerate(self.parameters)
                if p in self.optimizer.state
            },
            "generator": self.generator.get_state(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue exactly where `state_dict` was taken. Raises `JelError` if the networks are others."""
        try:
            for name, module in (("policy", self.policy), ("value", self.value), ("averaged", self.averaged)):
                module.load_state_dict(state[name])
        except (RuntimeError, KeyError) as e:
            raise JelError(f"the saved PPO state does not fit: {str(e).splitlines()[0]}") from None
        for i, p in enumerate(self.parameters):
            if str(i) in state["adam"]:
                self.optimizer.state[p] = {k: v.clone() for k, v in state["adam"][str(i)].items()}
        self.generator.set_state(state["generator"])
        self.updates = int(state["updates"])


def group_mean(x: Tensor, groups: Sequence[int]) -> Tensor:
    """The mean over each episode's group: (..., E) -> (..., E)."""
    _, index = torch.unique(torch.tensor(groups), return_inverse=True)
    sums = x.new_zeros(*x.shape[:-1], int(index.max()) + 1).index_add(-1, index, x)
    return (sums / torch.bincount(index))[..., index]
