"""The policy update of our recipe: the policy follows the gradient of a critic that has seen every episode so far.

Shapes: E episodes (the group), N episodes so far, M sampled action sequences, K decisions, S features, A knobs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from jel.errors import JelError
from jel.learn.advantages import total_returns
from jel.learn.critic import Critic
from jel.learn.exploration import exploration_noise
from jel.learn.learner_state import learner_state, load_learner_state, make_adam
from jel.learn.rollout import Rollout
from jel.policy import GaussianPolicy

SAMPLES = 32  # action sequences that the expectation over the policy is taken from


class ActorCriticUpdate:
    """Owns the critic, the episodes it has seen, and the policy's Adam: a twin of `jel.learn.grpo.PolicyUpdate`.

    `update` fits the critic to all episodes, then raises its expectation under the policy, E[Q(mean + std * noise)],
    by `steps` of Adam at `lr`, while the policy's mean stays within `trust_region` (nats of KL divergence a decision,
    exploration widths alike) of the one that the group was drawn from. What the expectation counts is a return
    - less `pessimism` standard deviations of the critic, so that the policy stays near what was tried,
    - less `variation_cost` times the mean square by which the raw actions differ from their mean over the episode: a
      schedule must earn what it varies,
    - less `departure_cost` times the mean square of the raw actions: a knob that hardly matters over an episode stays
      at the base's value (weight decay needs more steps to act), and none drifts to its bound, where tanh is flat.
    Both costs are in standard deviations of the returns. With a wide `final_log_std` the policy ends where returns are
    high all around it, not on a narrow peak, which a longer run need not have.

    The exploration width is annealed: log_std goes from the policy's initial one to `final_log_std`. What a policy
    observes beside progress is taken as it was in the last group.
    """

    returns: Callable[[Tensor, Tensor, float], Tensor] = staticmethod(total_returns)
    gamma = 1.0

    def __init__(
        self,
        policy: GaussianPolicy,
        *,
        lr: float,
        steps: int,
        trust_region: float,
        pessimism: float,
        variation_cost: float,
        departure_cost: float,
        initial_log_std: float,
        final_log_std: float,
        correlation: float,
        seed: int,
    ):
        self.policy, self.steps, self.trust_region, self.correlation = policy, steps, trust_region, correlation
        self.pessimism, self.variation_cost, self.departure_cost = pessimism, variation_cost, departure_cost
        self.initial_log_std, self.final_log_std = initial_log_std, final_log_std
        self.critic, self.generator = Critic(policy.n_actions), torch.Generator().manual_seed(seed)
        self.optimizer = make_adam(policy, lr)
        self._episodes: dict[str, Tensor] = {}

    def update(self, rollout: Rollout, number: int, of: int) -> dict[str, float | None]:
        """Learn from one more group, as update `number` (from 0) `of` so many; the policy changes in place.

        Returns `loss` (minus the critic's expectation), `entropy` (nats per action dimension), `approx_kl` (nats a
        decision, of the means) and `critic_error` (how far the critic was off for this group before it saw it, as a
        share of the group's spread; None for the first). Raises `JelError` if no episode is alive.
        """
        if not rollout.alive.any():
            raise JelError("no episode of this update started with a finite probe loss; check the task, not the policy")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums do not depend on the machine's cores
        try:
            error = self._remember(rollout, number)
            self.critic.fit(**self._episodes)
            return {**self._raise(rollout.states, number, of), "critic_error": error}
        finally:
            torch.set_num_threads(threads)

    def _remember(self, rollout: Rollout, number: int) -> float | None:
        """Add a group to the episodes. An episode that ends worse than it began counts as one that learned nothing."""
        begun = rollout.alive[:, 0]
        returns = self.returns(rollout.rewards, rollout.alive, self.gamma)[:, 0].clamp_min(0.0)[begun]
        actions = rollout.actions[begun]
        error = None
        if self._episodes and len(returns) > 1:
            with torch.no_grad():
                wrong = returns - self.critic.returns(actions).float()
            error = float(wrong.std() / returns.std().clamp_min(1e-9))
        new = {"raw": actions, "groups": torch.full((len(returns),), number), "returns": returns}
        self._episodes = {name: torch.cat([self._episodes.get(name, t[:0]), t]) for name, t in new.items()}
        return error

    def _raise(self, states: Tensor, number: int, of: int) -> dict[str, float]:
        E, K, _ = states.shape
        now, following = (min(1.0, n / max(1, of - 1)) for n in (number, number + 1))
        width, log_std = (
            self.initial_log_std + share * (self.final_log_std - self.initial_log_std) for share in (now, following)
        )
        states = states[torch.arange(SAMPLES) % E]  # (M, K, S)
        with torch.no_grad():
            old_mean = self.policy(states)[0]
        for _ in range(self.steps):
            noise = exploration_noise((SAMPLES, K, self.policy.n_actions), self.generator, self.correlation, True)
            mean, own_log_std = self.policy(states)
            actions = mean + math.exp(width) * noise
            value = self.critic.returns(actions, self.pessimism).mean()
            varied = (mean - mean.mean(1, keepdim=True)).square().mean((0, 1)).sum()
            kl = 0.5 * ((mean - old_mean) / math.exp(width)).square().sum(-1).mean()
            departed = mean.square().mean((0, 1)).sum()
            cost = self.critic.unit * (self.variation_cost * varied + self.departure_cost * departed)
            loss = cost - value + torch.relu(kl - self.trust_region)
            self.optimizer.zero_grad()
            (loss + (own_log_std - log_std).square().mean()).backward()
            self.optimizer.step()
        with torch.no_grad():
            entropy = self.policy.entropy(states).mean()
        return {"loss": -value.item(), "entropy": entropy.item(), "approx_kl": kl.item()}

    def state_dict(self) -> dict:
        """All that the next update depends on: nested dicts with string keys and tensors at the leaves, copies."""
        return {
            "learner": learner_state(self.policy, self.optimizer, self.generator),
            "critic": self.critic.hyperparameters.clone(),
            "episodes": {name: t.clone() for name, t in self._episodes.items()},
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue exactly where `state_dict` was taken. Raises `JelError` if it is that of another policy network."""
        load_learner_state(state["learner"], self.policy, self.optimizer, self.generator)
        self._episodes = {name: t.clone() for name, t in state.get("episodes", {}).items()}
        self.critic.hyperparameters = state["critic"].clone()  # those of the prior, where there is no episode yet
        if self._episodes:
            self.critic.condition(state["critic"], **self._episodes)
