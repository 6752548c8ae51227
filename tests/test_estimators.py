"""The noise of a gradient estimate is what its definition says, and the estimates point where the return rises."""

from __future__ import annotations

import pytest
import torch

from jel import GaussianPolicy
from jel.learn.advantages import RETURNS
from jel.learn.rollout import Rollout
from scripts.estimators import critic_gradient, noise_of, score_gradient
from tests.jel_parts import generator


def test_the_noise_is_variance_over_squared_mean():
    mean = torch.tensor([3.0, -1.0, 0.5])
    gradients = mean + 2.0 * torch.randn(20_000, 3, generator=generator())
    assert noise_of(gradients) == pytest.approx(3 * 4.0 / float(mean.square().sum()), rel=0.05)
    assert noise_of(torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])) == float("inf")


@pytest.mark.parametrize("estimate", [*RETURNS, "critic"])
def test_every_estimate_points_uphill(estimate):
    """A return that rises with the first knob, and does not depend on the second."""
    policy = GaussianPolicy(seed=0)
    E, K, A = 64, 4, policy.n_actions
    states = (torch.arange(K) / K)[None, :, None].expand(E, K, 1)
    actions, log_probs = policy.act(states, torch.randn(E, K, A, generator=generator(1)))
    rewards = torch.tanh(actions[..., 0])
    alive = torch.ones(E, K, dtype=torch.bool)
    rollout = Rollout(states, actions, log_probs, rewards + 1, alive, torch.zeros(E, K + 1))
    found = critic_gradient(rollout, policy) if estimate == "critic" else score_gradient(rollout, policy, estimate)
    assert found[0] > 0 and found[0] > 3 * found[1].abs()
