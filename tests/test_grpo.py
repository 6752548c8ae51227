"""The policy update: its loss against a slow twin, its minibatches, and an exact resume."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from jel import GaussianPolicy, JelError
from jel.learn.advantages import discounted_returns, group_advantages, standard_grpo_advantages
from jel.learn.grpo import PolicyUpdate, clipped_policy_loss, minibatches
from jel.learn.rollout import Rollout
from tests.jel_parts import NAN, E, K, generator, lively_policy, random_alive, same, sampled


def test_clipped_loss_against_one_sample_at_a_time():
    g = generator(3)
    new, old, advantages = (torch.randn(200, generator=g, dtype=torch.float64) * s for s in (0.4, 0.4, 2.0))
    total = 0.0
    for n, o, a in zip(new.tolist(), old.tolist(), advantages.tolist()):
        ratio = math.exp(n - o)
        total += min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
    assert clipped_policy_loss(new, old, advantages, 0.2).item() == pytest.approx(-total / 200)


# -----------------------------------------------------------------------------
# the update

SETTINGS = dict(lr=3e-4, gamma=0.99, clip=0.2, epochs=4, minibatch_size=64, entropy_coef=0.0, seed=0)


def make_rollout(policy, seed, reward=lambda a: -(a - 0.7).square().sum(-1), episodes=8, decisions=K) -> Rollout:
    states = (torch.arange(decisions) / decisions).expand(episodes, decisions)[..., None]
    actions, log_probs = sampled(policy, states, seed)
    alive = torch.ones(episodes, decisions, dtype=torch.bool)
    return Rollout(states, actions, log_probs, reward(actions), alive, torch.zeros(episodes, decisions + 1))


def remembering(policy: GaussianPolicy) -> GaussianPolicy:
    """Says of itself that it has a memory, so that it is updated on whole episodes."""
    policy.recurrent = True
    return policy


def test_the_first_step_has_ratio_one_and_is_the_plain_policy_gradient():
    policy, twin = lively_policy(), lively_policy()
    rollout = make_rollout(policy, 0)
    stats = PolicyUpdate(policy, **{**SETTINGS, "epochs": 1, "minibatch_size": 10**6}).update(rollout)
    advantages = group_advantages(discounted_returns(rollout.rewards, rollout.alive, 0.99), rollout.alive)
    (-twin.log_prob(rollout.states, rollout.actions) * advantages).mean().backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in twin.parameters()))
    assert stats["loss"] == pytest.approx(0.0, abs=1e-6)  # ratio 1, so minus the mean advantage
    assert stats["grad_norm"] == pytest.approx(norm, rel=1e-4)
    torch.optim.Adam(twin.parameters(), lr=3e-4).step()
    for p, q in zip(policy.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("wrap", [lambda policy: policy, remembering])
def test_dead_samples_do_not_reach_the_policy(wrap):
    policies = [wrap(lively_policy()), wrap(lively_policy())]
    clean = make_rollout(policies[0], 1)
    alive = clean.alive.clone()
    alive[2, 5:], alive[3, :] = False, False
    poison = lambda x: torch.where(alive if x.ndim == 2 else alive[..., None], x, NAN)
    dirty = {name: poison(getattr(clean, name)) for name in ("states", "actions", "log_probs", "rewards")}
    rollouts = [dataclasses.replace(clean, alive=alive), dataclasses.replace(clean, alive=alive, **dirty)]
    stats = [PolicyUpdate(p, **{**SETTINGS, "minibatch_size": K}).update(r) for p, r in zip(policies, rollouts)]
    assert stats[0] == stats[1] and all(math.isfinite(v) for v in stats[0].values())
    assert same(*policies) and all(p.isfinite().all() for p in policies[0].parameters())
    with pytest.raises(JelError, match="no episode"):
        PolicyUpdate(policies[0], **SETTINGS).update(dataclasses.replace(clean, alive=torch.zeros_like(alive)))


def test_whole_episodes_in_one_minibatch_are_the_same_step():
    """All samples at once: whether they come one by one or as episodes, the step is one and the same."""
    policies = [lively_policy(), remembering(lively_policy())]
    rollout = dataclasses.replace(make_rollout(policies[0], 0, episodes=E), alive=random_alive(3))
    stats = [PolicyUpdate(p, **{**SETTINGS, "epochs": 1, "minibatch_size": 10**6}).update(rollout) for p in policies]
    assert stats[0]["grad_norm"] == pytest.approx(stats[1]["grad_norm"], rel=1e-4)
    for p, q in zip(*(policy.parameters() for policy in policies)):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-6)


def test_the_update_takes_the_returns_and_advantages_it_is_given():
    seen = []

    def returns(rewards, alive, gamma):
        seen.append(gamma)
        return rewards * 2

    def advantages(found, alive):
        seen.append(found)
        return standard_grpo_advantages(found, alive)

    policies = [lively_policy(), lively_policy()]
    rollout = make_rollout(policies[0], 2)
    PolicyUpdate(policies[0], **SETTINGS, returns=returns, advantages=advantages).update(rollout)
    assert seen[0] == 0.99 and torch.equal(seen[1], rollout.rewards * 2)
    PolicyUpdate(policies[1], **SETTINGS).update(rollout)
    assert not same(*policies)


# -----------------------------------------------------------------------------
# minibatches


@pytest.mark.parametrize("size", [1, 5, 64])
def test_single_decisions_cover_each_living_sample_once(size):
    alive = random_alive(5)
    batches = list(minibatches(alive, size, False, generator(1)))
    covered = [pair for at in batches for pair in zip(at[0].tolist(), at[1].tolist())]
    assert len(set(covered)) == len(covered) and sorted(covered) == [tuple(at) for at in alive.nonzero().tolist()]
    assert [len(at[0]) for at in batches[:-1]] == [size] * (len(batches) - 1)


@pytest.mark.parametrize("size", [1, 2 * K, 10**6])
def test_whole_episodes_keep_the_order_of_time(size):
    alive, states = random_alive(5), torch.arange(E * K).view(E, K)
    begun = [e for e in range(E) if alive[e].any()]
    assert len(begun) < E  # one of them was never alive: it would make a minibatch of nothing
    covered = []
    for at in minibatches(alive, size, True, generator(1)):
        found, living = states[at], alive[at]
        assert found.shape[1] == K and len(found) <= max(1, size // K) and living.any(dim=1).all()
        assert (found.diff(dim=1) == 1).all() and (found[:, 0] % K == 0).all()
        covered += found[living].tolist()
    assert len(covered) == len(set(covered)) and sorted(covered) == states[alive].tolist()


@pytest.mark.parametrize("whole_episodes", [False, True])
def test_epochs_differ_and_come_from_the_generator(whole_episodes):
    def epochs(seed):
        g = generator(seed)
        at = [list(minibatches(torch.ones(E, K, dtype=torch.bool), K, whole_episodes, g)) for _ in range(2)]
        return [[e.flatten().tolist() for e, _ in epoch] for epoch in at]

    assert epochs(1) == epochs(1) != epochs(2)
    assert epochs(1)[0] != epochs(1)[1]


# -----------------------------------------------------------------------------
# learning


def test_grpo_finds_the_best_action_of_a_bandit():
    policy = GaussianPolicy()
    update = PolicyUpdate(policy, **{**SETTINGS, "lr": 3e-3})
    for seed in range(100):
        stats = update.update(make_rollout(policy, seed, episodes=16, decisions=4))
    mean, log_std = policy(torch.tensor([[0.0], [0.5]]))
    torch.testing.assert_close(mean, torch.full_like(mean, 0.7), atol=0.15, rtol=0)
    assert stats["entropy"] < 0.7 and stats["approx_kl"] >= 0  # a bandit with one best arm: certainty pays
    assert 0 <= stats["clip_fraction"] <= 1


def test_entropy_bonus_widens_the_policy():
    entropies = []
    for coef in (0.0, 1.0):
        policy = GaussianPolicy()
        update = PolicyUpdate(policy, **{**SETTINGS, "entropy_coef": coef, "lr": 3e-3})
        flat = make_rollout(policy, 0, reward=lambda a: torch.zeros(a.shape[:-1]))
        entropies.append(update.update(flat)["entropy"])
    assert entropies[0] == pytest.approx(0.919, abs=0.02) and entropies[1] > entropies[0] + 0.005


def test_update_resumes_exactly():
    policy = GaussianPolicy()
    update = PolicyUpdate(policy, **SETTINGS)
    fresh_layout = json.dumps({k: list(v) for k, v in update.state_dict().items() if isinstance(v, dict)})
    update.update(make_rollout(policy, 0))
    saved = update.state_dict()
    assert json.dumps({k: list(v) for k, v in saved.items() if isinstance(v, dict)}) == fresh_layout
    want = [update.update(make_rollout(policy, s)) for s in (1, 2)]
    other = GaussianPolicy(seed=9)
    resumed = PolicyUpdate(other, **{**SETTINGS, "seed": 77})
    resumed.load_state_dict(saved)
    assert [resumed.update(make_rollout(other, s)) for s in (1, 2)] == want
    assert same(policy, other)
    for wrong in ({}, {**saved, "extra": 1}, PolicyUpdate(GaussianPolicy(hidden=8), **SETTINGS).state_dict()):
        with pytest.raises(JelError, match="does not fit"):
            resumed.load_state_dict(wrong)
