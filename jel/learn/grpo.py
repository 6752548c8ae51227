"""Group-relative policy optimisation without length and variance normalisation (paper 3.5).

Shapes: E episodes (the group), K decisions, S features, A knobs, N samples of a minibatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from jel.errors import JelError
from jel.learn.advantages import discounted_returns, group_advantages
from jel.learn.learner_state import learner_state, load_learner_state, make_adam
from jel.learn.rollout import Rollout
from jel.policy import GaussianPolicy


def clipped_policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Minus the clipped objective (eq. 4), mean over N samples: three (N,) -> scalar."""
    ratio = (log_probs - old_log_probs).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def minibatches(
    alive: Tensor, size: int, whole_episodes: bool, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order, as (episode, decision) indices: of single decisions, or of whole episodes.

    Single decisions: about `size` alive ones at a time, two (N,). Whole episodes, for policies with a memory: those
    with an alive decision, about `size` decisions at a time, (n, 1) and (1, K), which index (n, K) in order of time.
    """
    K = alive.shape[1]
    if not whole_episodes:
        episodes, decisions = alive.nonzero(as_tuple=True)
        for i in torch.randperm(len(episodes), generator=generator).split(size):
            yield episodes[i], decisions[i]
        return
    begun = alive.any(dim=1).nonzero().flatten()
    for i in torch.randperm(len(begun), generator=generator).split(max(1, size // K)):
        yield begun[i][:, None], torch.arange(K)[None, :]


class PolicyUpdate:
    """Owns the policy's Adam and the shuffling: `update(rollout)` is one update of the paper's 50.

    `returns` maps (rewards, alive) to returns, by default the paper's, discounted by `gamma`; `advantages` maps
    (returns, alive) to advantages: `group_advantages`, or `standard_grpo_advantages` to ablate. `lr_schedule`:
    "constant", or "linear", which falls to 0 at the last update.
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
        lr_schedule: str = "constant",
        returns: Callable[[Tensor, Tensor, float], Tensor] = discounted_returns,
        advantages: Callable[[Tensor, Tensor], Tensor] = group_advantages,
    ):
        self.policy, self.lr, self.gamma, self.clip, self.epochs = policy, lr, gamma, clip, epochs
        self.minibatch_size, self.entropy_coef, self.lr_schedule = minibatch_size, entropy_coef, lr_schedule
        self.returns, self.advantages = returns, advantages
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = make_adam(policy, lr)

    def update(self, rollout: Rollout, number: int = 0, of: int = 1) -> dict[str, float]:
        """Run the epochs over shuffled minibatches of the alive samples; the policy changes in place.

        It is update `number` (from 0) `of` so many, which a learning rate that falls must know.

        Returns `loss` and `grad_norm` (means over the minibatches), and over the whole rollout, after the update,
        `entropy` (nats per action dimension), `approx_kl` (old to new, the estimate mean(ratio - 1 - log ratio)) and
        `clip_fraction` (samples whose ratio lies outside the clip range). Raises `JelError` if no sample is alive.
        """
        alive, old = rollout.alive, rollout.log_probs
        # whatever stands where an episode is not alive, a NaN there would spread through the gradient
        states, actions = (torch.where(alive[..., None], x, 0.0) for x in (rollout.states, rollout.actions))
        if not alive.any():
            raise JelError("no episode of this update started with a finite probe loss; check the task, not the policy")
        advantages = self.advantages(self.returns(rollout.rewards, alive, self.gamma), alive)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * (1 - number / of if self.lr_schedule == "linear" else 1.0)
        losses, norms = [], []
        for _ in range(self.epochs):
            for at in minibatches(alive, self.minibatch_size, self.policy.recurrent, self.generator):
                counts = alive[at]
                log_probs = self.policy.log_prob(states[at], actions[at])[counts]
                loss = clipped_policy_loss(log_probs, old[at][counts], advantages[at][counts], self.clip)
                if self.entropy_coef:
                    loss = loss - self.entropy_coef * self.policy.entropy(states[at])[counts].mean()
                self.optimizer.zero_grad()
                loss.backward()
                norms.append(
                    torch.nn.utils.get_total_norm(
                        [p.grad for p in self.policy.parameters() if p.grad is not None]
                    ).item()
                )
                self.optimizer.step()
                losses.append(loss.item())
        with torch.no_grad():
            log_ratio = (self.policy.log_prob(states, actions) - old)[alive]
            entropy = self.policy.entropy(states)[alive].mean()
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
        return learner_state(self.policy, self.optimizer, self.generator)

    def load_state_dict(self, state: dict) -> None:
        """Continue exactly where `state_dict` was taken. Raises `JelError` if it is that of another policy network."""
        load_learner_state(state, self.policy, self.optimizer, self.generator)
