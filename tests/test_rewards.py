"""The reward of a decision against slow twins, and what a blow-up is worth."""

from __future__ import annotations

import math

import pytest
import torch

from jel import JelError
from jel.learn.rewards import bounded_rewards, rewards
from tests.jel_parts import INF, NAN, A, E, K, generator


def reference_rewards(losses, actions, norms, lambda_g, lambda_s):
    out = torch.zeros(actions.shape[:2], dtype=losses.dtype)
    for e in range(actions.shape[0]):
        for k in range(actions.shape[1]):
            jump = 0.0
            for a in range(A if k else 0):
                jump += (math.tanh(actions[e, k, a]) - math.tanh(actions[e, k - 1, a])) ** 2
            out[e, k] = (losses[e, k] - losses[e, k + 1]) - lambda_g * norms[e, k] - lambda_s * jump
    return out


def random_episodes(seed=0):
    kind = {"generator": generator(seed), "dtype": torch.float64}
    losses = 5 - torch.rand(E, K + 1, **kind).cumsum(1) / 4
    return losses, torch.randn(E, K, A, **kind), torch.rand(E, K, **kind)


@pytest.mark.parametrize("lambda_g, lambda_s", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
def test_rewards_against_a_double_loop(lambda_g, lambda_s):
    losses, actions, norms = random_episodes()
    want = reference_rewards(losses, actions, norms, lambda_g, lambda_s)
    torch.testing.assert_close(rewards(losses, actions, norms, lambda_g, lambda_s), want)
    bounded, alive = bounded_rewards(losses, actions, norms, lambda_g, lambda_s, None)
    assert torch.equal(bounded, rewards(losses, actions, norms, lambda_g, lambda_s)) and alive.all()


def test_rewards_telescope_and_a_gradient_penalty_needs_norms():
    losses, actions, _ = random_episodes()
    torch.testing.assert_close(rewards(losses, actions, None, 0.0, 0.0).sum(1), losses[:, 0] - losses[:, -1])
    with pytest.raises(JelError, match="gradient norms"):
        rewards(losses, actions, None, 0.1, 0.0)


@pytest.mark.parametrize("blow_up", [NAN, INF, -INF, 1e30, 12.0])
@pytest.mark.parametrize("penalty", [None, 2.0])
def test_a_blow_up_ends_the_episode_with_a_bounded_reward(blow_up, penalty):
    losses, actions, norms = random_episodes()
    calm, _ = bounded_rewards(losses, actions, norms, 0.1, 0.1, penalty)
    losses[2, 5], losses[3, 1:], losses[4, 0] = blow_up, blow_up, NAN
    if blow_up == -INF:
        losses[3, 1:] = NAN
    got, alive = bounded_rewards(losses, actions, norms, 0.1, 0.1, penalty)
    assert got.isfinite().all()
    assert alive.sum(1).tolist() == [K, K, 5, 1, 0, K]
    for e in (2, 3):
        last = int(alive[e].sum()) - 1
        assert got[e, last] == -(losses[e, 0] if penalty is None else penalty)
        assert got[e, last] == got[e].min() and (got[e, last + 1 :] == 0).all()
        assert torch.equal(got[e, :last], calm[e, :last])
    assert (got[4] == 0).all()
    assert torch.equal(got[[0, 1, 5]], calm[[0, 1, 5]])


@pytest.mark.parametrize("penalty", [0.0, 1e-3, 50.0, None])
def test_the_penalty_says_what_a_blow_up_costs_and_not_when_it_happens(penalty):
    """An episode ends where its loss rises by more than the loss it began with; a small rise is only a bad reward."""
    losses, actions, _ = random_episodes()
    first = losses[:, 0]
    losses[0, 4] = losses[0, 3] + 0.5  # a little up
    losses[1, 4] = losses[1, 3] + 0.99 * first[1]
    losses[2, 4] = losses[2, 3] + 1.01 * first[2]
    got, alive = bounded_rewards(losses, actions, None, 0.0, 0.0, penalty)
    raw = rewards(losses, actions, None, 0.0, 0.0)
    assert alive.sum(1).tolist() == [K, K, 4, K, K, K]
    assert torch.equal(got[[0, 1, 3, 4, 5]], raw[[0, 1, 3, 4, 5]])
    assert got[2, 3] == -(first[2] if penalty is None else penalty) and (got[2, 4:] == 0).all()
