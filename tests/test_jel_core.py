"""The mathematics of meta-training against slow twins and properties: actions, rewards, advantages, the update.

E episodes, K decisions, A actions.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jel import IDENTITY, GaussianPolicy, JelError, apply_multipliers
from jel.actions import multipliers, scales_from_actions
from jel.learn.grpo import (
    PolicyUpdate,
    Rollout,
    clipped_policy_loss,
    discounted_returns,
    group_advantages,
    standard_grpo_advantages,
)
from jel.learn.rewards import bounded_rewards, rewards

E, K, A = 6, 12, 2
NAN, INF = float("nan"), float("inf")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lively_policy() -> GaussianPolicy:
    """A fresh policy's outputs hardly depend on the state; these do."""
    policy = GaussianPolicy(seed=1)
    with torch.no_grad():
        policy.net[4].weight *= 50
    return policy


def random_alive(seed: int) -> torch.Tensor:
    """(E, K): episodes that die at random decisions, one at once, one never."""
    lengths = torch.randint(1, K + 1, (E, 1), generator=generator(seed))
    lengths[0], lengths[1] = 0, K
    return torch.arange(K) < lengths


# -----------------------------------------------------------------------------
# actions


@pytest.mark.parametrize("r", [100.0, 1.5])
def test_scales_are_exp_of_log_range_tanh(r):
    raw = torch.tensor([[0.0, 20.0], [-20.0, 0.5]])
    want = [[1.0, r], [1 / r, math.exp(math.log(r) * math.tanh(0.5))]]
    torch.testing.assert_close(scales_from_actions(raw, r), torch.tensor(want))


def test_multipliers_names_the_last_axis():
    assert multipliers(torch.tensor([2.0, 0.5])) == {"lr": 2.0, "weight_decay": 0.5}
    batched = multipliers(torch.arange(6.0).reshape(3, 2))
    assert batched["lr"].tolist() == [0, 2, 4] and batched["weight_decay"].tolist() == [1, 3, 5]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e3), st.floats(0, 1e3)), min_size=1, max_size=4))
def test_identity_writes_the_base_bit_for_bit(values):
    groups = [{"name": str(i), "lr": -1.0, "weight_decay": -1.0, "betas": (0.8, 0.95)} for i in range(len(values))]
    base = [{"lr": lr, "weight_decay": wd} for lr, wd in values]
    for identity in (IDENTITY, {}, {"0": {"lr": 1.0}}):
        apply_multipliers(groups, base, identity)
        assert [(g["lr"].hex(), g["weight_decay"].hex()) for g in groups] == [(a.hex(), b.hex()) for a, b in values]
    assert all(g["betas"] == (0.8, 0.95) for g in groups)


def test_own_name_wins_over_star_by_hyperparameter():
    groups, base = [{"name": "a"}, {"name": "b"}, {}], [{"lr": 1.0, "weight_decay": 1.0}] * 3
    apply_multipliers(groups, base, {"*": {"lr": 2.0, "weight_decay": 3.0}, "b": {"lr": 5.0}})
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(2, 3), (5, 3), (2, 3)]


def test_batched_multipliers_are_products():
    groups, m = [{"name": "a"}], torch.tensor([0.5, 2.0])
    base = [{"lr": 0.1, "weight_decay": torch.tensor([1.0, 3.0])}]
    apply_multipliers(groups, base, {"*": {"lr": m, "weight_decay": m}})
    torch.testing.assert_close(groups[0]["lr"], 0.1 * m)
    torch.testing.assert_close(groups[0]["weight_decay"], torch.tensor([0.5, 6.0]))


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"lm_haed": {"lr": 1.0}}, "the groups are \\*, a, b"),
        ({"*": {"lr": NAN}}, "finite"),
        ({"a": {"lr": INF}}, "finite"),
        ({"a": {"lr": 0.0}}, "above 0"),
        ({"b": {"weight_decay": -1.0}}, "above 0"),
        ({"a": {"lr": "2"}}, "finite"),
        ({"a": {"beta": 2.0}}, "sets only lr, weight_decay"),
        ({"a": 2.0}, "must map"),
        (None, "must map"),
    ],
)
def test_bad_multipliers_are_refused_before_anything_is_written(bad, message):
    groups = [{"name": "a", "lr": 7.0}, {"name": "b", "lr": 7.0}]
    with pytest.raises(JelError, match=message):
        apply_multipliers(groups, [{"lr": 1.0, "weight_decay": 1.0}] * 2, bad)
    assert [g["lr"] for g in groups] == [7.0, 7.0]


# -----------------------------------------------------------------------------
# rewards


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


# -----------------------------------------------------------------------------
# returns and advantages


def test_returns_against_a_double_loop():
    for seed in range(5):
        r, alive = torch.randn(E, K, generator=generator(seed), dtype=torch.float64), random_alive(seed)
        want = torch.zeros(E, K, dtype=torch.float64)
        for e in range(E):
            for k in range(K):
                for j in range(k, K):
                    if alive[e, j]:
                        want[e, k] += 0.9 ** (j - k) * r[e, j]
        torch.testing.assert_close(discounted_returns(torch.where(alive, r, NAN), 0.9, alive), want)


def test_advantages_of_a_group_sum_to_zero_over_the_living():
    for seed in range(5):
        returns, alive = torch.randn(E, K, generator=generator(seed), dtype=torch.float64), random_alive(seed)
        advantages = group_advantages(torch.where(alive, returns, NAN), alive)
        torch.testing.assert_close(advantages.sum(0), torch.zeros(K, dtype=torch.float64), atol=1e-12, rtol=0)
        for k in range(K):
            living = [e for e in range(E) if alive[e, k]]
            for e in range(E):
                want = returns[e, k] - sum(returns[j, k] for j in living) / len(living) if alive[e, k] else 0.0
                assert advantages[e, k].item() == pytest.approx(float(want), abs=1e-12)


def test_advantages_are_linear_in_the_returns():  # no variance normalisation
    returns, alive = torch.randn(E, K, generator=generator()), random_alive(1)
    torch.testing.assert_close(group_advantages(7 * returns + 3, alive), 7 * group_advantages(returns, alive))


def test_standard_grpo_normalises_variance_and_length():
    returns, alive = torch.randn(E, K, generator=generator(), dtype=torch.float64), torch.ones(E, K, dtype=torch.bool)
    full = standard_grpo_advantages(returns, alive)
    torch.testing.assert_close(full, (returns - returns.mean(0)) / returns.std(0, correction=0), rtol=1e-5, atol=1e-5)
    alive = random_alive(2)
    got = standard_grpo_advantages(returns, alive)
    assert got.isfinite().all() and (got[~alive] == 0).all()
    plain = group_advantages(returns, alive)
    per_k = plain / ((plain.square().sum(0) / alive.sum(0)).sqrt() + 1e-6)
    weights = torch.randn(E, K, generator=generator(4), dtype=torch.float64)  # any loss that is a mean of terms
    by_episode = [(weights[e] * per_k[e])[alive[e]].mean() for e in range(E) if alive[e].any()]
    torch.testing.assert_close((weights * got)[alive].mean(), torch.stack(by_episode).mean())


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
    actions, log_probs = policy.sample(states, generator(seed))
    return Rollout(states, actions, log_probs, reward(actions), torch.ones(episodes, decisions, dtype=torch.bool))


def test_the_first_step_has_ratio_one_and_is_the_plain_policy_gradient():
    policy, twin = lively_policy(), lively_policy()
    rollout = make_rollout(policy, 0)
    stats = PolicyUpdate(policy, **{**SETTINGS, "epochs": 1, "minibatch_size": 10**6}).update(rollout)
    advantages = group_advantages(discounted_returns(rollout.rewards, 0.99, rollout.alive), rollout.alive)
    (-twin.log_prob(rollout.states, rollout.actions) * advantages).mean().backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in twin.parameters()))
    assert stats["loss"] == pytest.approx(0.0, abs=1e-6)  # ratio 1, so minus the mean advantage
    assert stats["grad_norm"] == pytest.approx(norm, rel=1e-4)
    torch.optim.Adam(twin.parameters(), lr=3e-4).step()
    for p, q in zip(policy.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-6)


def test_dead_samples_do_not_reach_the_policy():
    policies = [lively_policy(), lively_policy()]
    clean = make_rollout(policies[0], 1)
    alive = clean.alive.clone()
    alive[2, 5:], alive[3, :] = False, False
    poison = lambda x: torch.where(alive if x.ndim == 2 else alive[..., None], x, NAN)
    rollouts = [
        Rollout(clean.states, clean.actions, clean.log_probs, clean.rewards, alive),
        Rollout(clean.states, *map(poison, (clean.actions, clean.log_probs, clean.rewards)), alive),
    ]
    stats = [PolicyUpdate(p, **SETTINGS).update(r) for p, r in zip(policies, rollouts)]
    assert stats[0] == stats[1] and all(math.isfinite(v) for v in stats[0].values())
    assert all(torch.equal(p, q) for p, q in zip(policies[0].parameters(), policies[1].parameters()))
    with pytest.raises(JelError, match="no episode"):
        PolicyUpdate(policies[0], **SETTINGS).update(dataclasses.replace(clean, alive=torch.zeros_like(alive)))


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
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), other.parameters()))
    for wrong in ({}, {**saved, "extra": 1}, PolicyUpdate(GaussianPolicy(hidden=8), **SETTINGS).state_dict()):
        with pytest.raises(JelError, match="does not fit"):
            resumed.load_state_dict(wrong)


def test_importing_jel_brings_in_nothing_heavy_but_torch():
    code = (
        "import sys, jel, jel.learn.grpo, jel.learn.rewards; "
        "print([m for m in ('nanochat', 'matplotlib', 'wandb', 'pandas', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
