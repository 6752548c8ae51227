"""The policy update of our recipe: a critic of whole episodes says where to go, and the policy is fitted to that.

Shapes: E episodes (the group), N episodes so far, M starts of the ascent, K decisions, S features, A knobs.
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

STARTS = 3  # episodes of the past that the ascent begins at, beside the present mean
SAMPLES = 8  # antithetic draws of constant noise that the critic's return is averaged over
ASCENT_STEPS, ASCENT_LR = 100, 0.05
FARTHEST = 2.5  # of a raw action: tanh is 0.987 there


class ActorCriticUpdate:
    """Owns the critic, the episodes it has seen, and the policy's Adam: a twin of `jel.learn.grpo.PolicyUpdate`.

    `update` fits the critic to all episodes; improves the actions of an episode by gradient ascent on the critic, from
    the policy's mean and from the best episodes so far; and fits the policy to the best of these by `steps` of Adam at
    `lr`. The ascent counts the critic's return under noise of the exploration's width, less `pessimism` standard
    deviations of the critic, so that it stays near what was tried, less `smoothness` times the mean square by which the
    raw actions of an episode differ from their mean, in standard deviations of the returns: a schedule must earn
    what it varies.

    The exploration width is annealed: log_std goes from the policy's initial one to `final_log_std`. What a policy
    observes beside progress plays no part: it is fitted to the same actions whatever it sees.
    """

    returns: Callable[[Tensor, Tensor, float], Tensor] = staticmethod(total_returns)
    gamma = 1.0

    def __init__(
        self,
        policy: GaussianPolicy,
        *,
        lr: float,
        steps: int,
        pessimism: float,
        smoothness: float,
        initial_log_std: float,
        final_log_std: float,
        seed: int,
    ):
        self.policy, self.steps, self.pessimism, self.smoothness = policy, steps, pessimism, smoothness
        self.initial_log_std, self.final_log_std = initial_log_std, final_log_std
        self.critic, self.generator = Critic(policy.n_actions), torch.Generator().manual_seed(seed)
        self.optimizer = make_adam(policy, lr)
        self._episodes: dict[str, Tensor] = {}

    def update(self, rollout: Rollout, number: int, of: int) -> dict[str, float | None]:
        """Learn from one more group, as update `number` (from 0) `of` so many; the policy changes in place.

        Returns `loss` (mean square by which the policy's mean misses the improved actions), `entropy` (nats per action
        dimension), `approx_kl` (nats an episode, of the old mean from the new), `expected_return` (the critic's, there)
        and `critic_error` (how far the critic was off for this group before it saw it, as a share of the group's
        spread; None for the first). Raises `JelError` if no episode is alive.
        """
        if not rollout.alive.any():
            raise JelError("no episode of this update started with a finite probe loss; check the task, not the policy")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums do not depend on the machine's cores
        try:
            error = self._remember(rollout, number)
            self.critic.fit(*(self._episodes[name] for name in ("actions", "groups", "returns")))
            return {**self._improve(rollout.states, number, of), "critic_error": error}
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
        new = {"actions": actions, "groups": torch.full((len(returns),), number), "returns": returns}
        self._episodes = {name: torch.cat([self._episodes.get(name, t[:0]), t]) for name, t in new.items()}
        return error

    def _improve(self, states: Tensor, number: int, of: int) -> dict[str, float]:
        share = 1.0 if number + 1 >= of else (number + 1) / (of - 1)
        old_width, log_std = (
            self.initial_log_std + x * (self.final_log_std - self.initial_log_std)
            for x in (min(1.0, number / max(1, of - 1)), share)
        )
        with torch.no_grad():
            old_mean = self.policy(states)[0]
        starts = torch.cat([old_mean[:1], self._best_episodes()])
        target, expected = self._ascend(starts, math.exp(old_width if share < 1 else log_std))
        for _ in range(self.steps):
            mean, own_log_std = self.policy(states)
            miss = (mean - target).square().mean()
            self.optimizer.zero_grad()
            (miss + (own_log_std - log_std).square().mean()).backward()
            self.optimizer.step()
        with torch.no_grad():
            mean = self.policy(states)[0]
            kl = 0.5 * ((mean - old_mean) / math.exp(old_width)).square().sum(-1).mean()
            entropy = self.policy.entropy(states).mean()
        statistics = {"loss": miss.item(), "entropy": entropy.item(), "approx_kl": kl.item()}
        return {**statistics, "expected_return": expected}

    def _best_episodes(self) -> Tensor:
        """Actions of the past episodes that the critic expects most of: up to (STARTS, K, A)."""
        actions = self._episodes["actions"]
        with torch.no_grad():
            order = self.critic.returns(actions, self.pessimism).argsort(descending=True)
        return actions[order[:STARTS]]

    def _ascend(self, starts: Tensor, width: float) -> tuple[Tensor, float]:
        """The best end (K, A) of gradient ascents from `starts` (M, K, A), and the critic's return there."""
        M, _, A = starts.shape
        actions = starts.clone().requires_grad_()
        adam = torch.optim.Adam([actions], lr=ASCENT_LR)

        def values() -> tuple[Tensor, Tensor]:
            noise = width * exploration_noise((SAMPLES, 1, A), self.generator, antithetic=True)
            tried = (actions[:, None] + noise).flatten(0, 1)
            expected = self.critic.returns(tried, self.pessimism).view(M, SAMPLES).mean(1)  # (M,)
            varied = (actions - actions.mean(1, keepdim=True)).square().mean(1).sum(1)
            return expected, expected - self.smoothness * self.critic.unit * varied

        for _ in range(ASCENT_STEPS):
            adam.zero_grad()
            (-values()[1].sum()).backward()
            adam.step()
            with torch.no_grad():
                actions.clamp_(-FARTHEST, FARTHEST)
        with torch.no_grad():
            expected, value = (torch.stack(v).mean(0) for v in zip(*(values() for _ in range(8))))
        best = int(value.argmax())
        return actions.detach()[best], expected[best].item()

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
        self.critic.hyperparameters = state["critic"].clone()
        self._episodes = {name: t.clone() for name, t in state["episodes"].items()}
