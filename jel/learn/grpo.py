"""Group-relative policy optimisation without length and variance normalisation (paper 3.5).

Shapes: E episodes (the group), K decisions, S state size, A actions, N samples of a minibatch.
`alive` (E, K) is False for the decisions after an episode has blown up; they take no part in anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from jel.errors import JelError
from jel.policy import GaussianPolicy


@dataclass(frozen=True)
class Rollout:
    """What one group of episodes leaves behind for the policy update; on the policy's device, the CPU."""

    states: Tensor  # (E, K, S)
    actions: Tensor  # (E, K, A) raw, before the tanh
    log_probs: Tensor  # (E, K) under the policy that sampled the actions
    rewards: Tensor  # (E, K)
    alive: Tensor  # (E, K) bool


# -----------------------------------------------------------------------------
# returns, advantages, loss


def discounted_returns(rewards: Tensor, gamma: float, alive: Tensor) -> Tensor:
    """`R_k = sum over k' >= k of gamma^(k' - k) r_k'` (eq. 1): (E, K) -> (E, K), 0 where not alive."""
    rewards = torch.where(alive, rewards, 0.0)
    returns = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for k in reversed(range(rewards.shape[1])):
        returns[:, k] = following = rewards[:, k] + gamma * following
    return returns


def group_advantages(returns: Tensor, alive: Tensor) -> Tensor:
    """Return minus the group's mean return at the same decision index (eq. 2, 3): (E, K) -> (E, K).

    Mean over the alive members; 0 where not alive. Divided by nothing: neither by a standard deviation nor a length.
    """
    baseline = _mean_over_alive(returns, alive)  # (1, K)
    return torch.where(alive, returns - baseline, 0.0)


def standard_grpo_advantages(returns: Tensor, alive: Tensor, eps: float = 1e-6) -> Tensor:
    """With both normalisations of standard GRPO, for the paper's ablation (4.4): (E, K) -> (E, K).

    Variance: divided by the group's standard deviation at the same decision index. Length: GRPO averages an episode's
    terms over its own length before it averages over episodes; weighting a term by (mean length / own length) says
    the same to a loss that averages over all alive samples, and is 1 when every episode lives to its end.
    """
    advantages = group_advantages(returns, alive)
    deviation = _mean_over_alive(advantages.square(), alive).sqrt()  # (1, K)
    lengths = alive.sum(1, keepdim=True).to(returns.dtype)  # (E, 1)
    mean_length = lengths.sum() / (lengths > 0).sum().clamp(min=1)
    return advantages / (deviation + eps) * mean_length / lengths.clamp(min=1)


def _mean_over_alive(x: Tensor, alive: Tensor) -> Tensor:
    """Mean over the episodes that are alive at each decision: (E, K) -> (1, K), 0 where none is."""
    return torch.where(alive, x, 0.0).sum(0, keepdim=True) / alive.sum(0, keepdim=True).clamp(min=1)


def clipped_policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Minus the clipped objective (eq. 4), mean over N samples: three (N,) -> scalar."""
    ratio = (log_probs - old_log_probs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


# -----------------------------------------------------------------------------
# one policy update


class PolicyUpdate:
    """Owns the policy's Adam and the shuffling: `update(rollout)` is one update of the paper's 50.

    `advantages` maps (returns, alive) to advantages: `group_advantages`, or `standard_grpo_advantages` to ablate.
    """

    def __init__(
        self,
        policy: GaussianPolicy,
        *,
        lr: float,
        gamma: float,
        clip: float,
        epochs: int,
        minibatch_size: int,
        entropy_coef: float,
        seed: int,
        advantages: Callable[[Tensor, Tensor], Tensor] = group_advantages,
    ):
        self.policy, self.gamma, self.clip, self.epochs = policy, gamma, clip, epochs
        self.minibatch_size, self.entropy_coef, self.advantages = minibatch_size, entropy_coef, advantages
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
        for p in policy.parameters():  # Adam's own start, made early so that the state always has one layout
            self.optimizer.state[p] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Run the epochs over shuffled minibatches of the alive samples; the policy changes in place.

        Returns `loss` and `grad_norm` (means over the minibatches), and over the whole rollout, after the update,
        `entropy` (nats per action dimension), `approx_kl` (old to new, the estimate mean(ratio - 1 - log ratio)) and
        `clip_fraction` (samples whose ratio lies outside the clip range). Raises `JelError` if no sample is alive.
        """
        alive = rollout.alive
        if not alive.any():
            raise JelError("no episode of this update started with a finite probe loss; check the task, not the policy")
        returns = discounted_returns(rollout.rewards, self.gamma, alive)
        advantages = self.advantages(returns, alive)[alive]
        states, actions, old = rollout.states[alive], rollout.actions[alive], rollout.log_probs[alive]
        losses, norms = [], []
        for _ in range(self.epochs):
            for i in torch.randperm(len(old), generator=self.generator).split(self.minibatch_size):
                log_probs = self.policy.log_prob(states[i], actions[i])
                loss = clipped_policy_loss(log_probs, old[i], advantages[i], self.clip)
                if self.entropy_coef:
                    loss = loss - self.entropy_coef * self.policy.entropy(states[i]).mean()
                self.optimizer.zero_grad()
                loss.backward()
                norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.policy.parameters()]).item())
                self.optimizer.step()
                losses.append(loss.item())
        with torch.no_grad():
            log_ratio = self.policy.log_prob(states, actions) - old
            entropy = self.policy.entropy(states).mean()
        ratio = log_ratio.exp()
        return {
            "loss": sum(losses) / len(losses),
            "grad_norm": sum(norms) / len(norms),
            "entropy": entropy.item(),
            "approx_kl": (ratio - 1 - log_ratio).mean().item(),
            "clip_fraction": ((ratio - 1).abs() > self.clip).float().mean().item(),
        }

    def state_dict(self) -> dict:
        """All that the next update depends on: nested dicts with string keys and tensors at the leaves, copies."""
        adam = {
            name: {key: value.clone() for key, value in self.optimizer.state[p].items()}
            for name, p in self.policy.named_parameters()
        }
        policy = {name: value.clone() for name, value in self.policy.state_dict().items()}
        return {"policy": policy, "optimizer": adam, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Continue exactly where `state_dict` was taken. Raises `JelError` if it is that of another policy network."""
        own = self.state_dict()
        if _layout(state) != _layout(own):
            raise JelError("the saved policy update does not fit this policy network; resume with the same sizes")
        self.policy.load_state_dict(state["policy"])
        self.generator.set_state(state["generator"])
        for name, p in self.policy.named_parameters():
            for key, value in self.optimizer.state[p].items():
                value.copy_(state["optimizer"][name][key])


def _layout(tree):
    """The shape of a nested dict: its keys, and at each leaf the tensor's shape."""
    if isinstance(tree, dict):
        return {key: _layout(value) for key, value in tree.items()}
    return tuple(tree.shape) if isinstance(tree, Tensor) else type(tree)
