"""Returns and advantages of a group of episodes, against slow twins and by their properties."""

from __future__ import annotations

import pytest
import torch

from jel.learn.advantages import controlled_returns, discounted_returns, group_advantages, standard_grpo_advantages
from tests.jel_parts import NAN, E, K, generator, random_alive


def test_returns_against_a_double_loop():
    for seed in range(5):
        r, alive = torch.randn(E, K, generator=generator(seed), dtype=torch.float64), random_alive(seed)
        want = torch.zeros(E, K, dtype=torch.float64)
        for e in range(E):
            for k in range(K):
                for j in range(k, K):
                    if alive[e, j]:
                        want[e, k] += 0.9 ** (j - k) * r[e, j]
        torch.testing.assert_close(discounted_returns(torch.where(alive, r, NAN), alive, 0.9), want)


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


def test_what_came_before_explains_nothing_of_a_controlled_return():
    for seed in range(3):
        r, alive = torch.randn(E, K, generator=generator(seed), dtype=torch.float64), random_alive(seed)
        returns = controlled_returns(torch.where(alive, r, NAN), alive, 0.9)
        for k in range(K):
            living = [e for e in range(E) if alive[e, k]]
            if len(living) < 2:
                continue
            before = torch.tensor([sum((float(r[e, j]) for j in range(k) if alive[e, j]), 0.0) for e in living])
            found = returns[living, k]
            assert abs(float(((before - before.mean()) * (found - found.mean())).sum())) < 1e-6
            total = torch.stack([torch.where(alive[e], r[e], 0.0).sum() for e in living])
            assert found.var() <= total.var() + 1e-9 and abs(float(found.mean() - total.mean())) < 1e-6
        torch.testing.assert_close(returns[:, 0], torch.where(alive, r, 0.0).sum(1))  # nothing came before
