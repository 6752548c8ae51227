"""Exploration noise and the recipes: each decision stays standard normal; pairs cancel; corrections are few knobs."""

from __future__ import annotations

import pytest
import torch

from jel import JelError
from jel.learn.advantages import group_advantages, total_returns
from jel.learn.exploration import exploration_noise
from jel.recipes.jel import JelRecipe
from tests.jel_parts import generator

MANY = (4000, 5, 2)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("antithetic", [False, True])
def test_every_decision_is_standard_normal_and_neighbours_correlate(correlation, antithetic):
    noise = exploration_noise(MANY, generator(1), correlation, antithetic)
    assert noise.shape == MANY and noise.mean().abs() < 0.03
    assert torch.allclose(noise.var(dim=0), torch.ones(5, 2), atol=0.1)
    for lag in (1, 2):
        found = (noise[:, lag:] * noise[:, :-lag]).mean()
        assert abs(found - correlation**lag) < 0.04


def test_pairs_are_opposite_and_an_odd_episode_stands_alone():
    noise = exploration_noise((5, 3, 2), generator(), 0.9, True)
    assert torch.equal(noise[0], -noise[1]) and torch.equal(noise[2], -noise[3]) and noise.shape == (5, 3, 2)


def test_without_choices_the_noise_is_the_papers():
    assert torch.equal(exploration_noise((8, 12, 2), generator(3)), torch.randn(8, 12, 2, generator=generator(3)))


def test_total_returns_are_the_fall_of_the_loss_whatever_the_decision():
    rewards = torch.randn(4, 6, generator=generator(2))
    alive = torch.ones(4, 6, dtype=torch.bool)
    alive[1, 3:] = False
    returns = total_returns(rewards, alive, 0.5)
    assert torch.allclose(returns[0], rewards[0].sum().expand(6)) and torch.allclose(
        returns[1, 0], rewards[1, :3].sum()
    )
    assert torch.allclose(group_advantages(returns, alive).sum(0), torch.zeros(6), atol=1e-5)


def test_corrections_add_a_knob_a_set_of_groups_around_the_shared_ones():
    recipe = JelRecipe(corrections={"head": ("lm_head",), "embeddings": ("wte", "value_embeds")}, correction_range=10)
    policy = recipe.policy(seed=0)
    assert [knob.name for knob in policy.knobs] == ["lr", "weight_decay", "head", "embeddings"]
    values = policy.actions.multipliers(torch.tensor([1.0, 0.5, 2.0, -2.0]))
    lr = values["*"]["lr"]
    assert set(values) == {"*", "lm_head", "wte", "value_embeds"} and "weight_decay" not in values["wte"]
    assert lr < values["lm_head"]["lr"] < 10 * lr and values["wte"]["lr"] == values["value_embeds"]["lr"] < lr
    with pytest.raises(JelError, match="correction_range is 1"):
        JelRecipe(correction_range=1).knobs()
