"""Search beside learning: the same episodes and knobs; it finds a better constant; a resume asks the same."""

from __future__ import annotations

import pytest
import torch

from jel import JelError
from jel.learn.rollout import Interrupted
from jel.learn.search import SEARCHES, set_constant
from jel.policy import GaussianPolicy, multiplier_table
from jel.recipes.jel import JelRecipe
from tests.jel_parts import QuadraticTask

pytest.importorskip("cmaes")
METHODS = sorted(SEARCHES)


def make(method, seed=3, stop=lambda: False):
    recipe = JelRecipe(episodes=8, decision_interval=5)
    return recipe.searcher(method, QuadraticTask(floor=0.1), seed, 8, stop_requested=stop)


@pytest.mark.parametrize("method", METHODS)
def test_it_finds_a_rate_that_is_better_than_the_base(method):
    """0.02 is far too careful for this quadratic, and too much of it diverges: the best is in between."""
    trainer = make(method)
    records = [trainer.update() for _ in range(15)]
    found = multiplier_table(trainer.policy, [0.0, 0.9])
    assert found[0]["multipliers"] == found[1]["multipliers"]  # a constant
    assert 3 < found[0]["multipliers"]["*"]["lr"] < 100
    assert records[-1]["multipliers"]["*"]["lr"][0] == found[0]["multipliers"]["*"]["lr"]


@pytest.mark.parametrize("method", METHODS)
def test_a_resume_changes_nothing(method):
    whole, first = make(method), make(method)
    for _ in range(5):
        whole.update()
    for _ in range(2):
        first.update()
    second = make(method)
    second.load_state_dict(first.state_dict())
    assert second.updates == 2
    for _ in range(3):
        second.update()
    assert all(torch.equal(a, b) for a, b in zip(whole.policy.parameters(), second.policy.parameters()))
    with pytest.raises(JelError, match="asked other questions"):
        make(method, seed=4).load_state_dict(first.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_group_is_asked_again(method):
    calm, calls = make(method), iter([False] * 7 + [True])
    disturbed = make(method, stop=lambda: next(calls, False))
    calm.update(), calm.update()
    disturbed.update()
    with pytest.raises(Interrupted):
        disturbed.update()
    disturbed.update()
    assert all(torch.equal(a, b) for a, b in zip(calm.policy.parameters(), disturbed.policy.parameters()))


def test_a_constant_policy_is_constant_and_deploys_what_it_was_given():
    policy, raw = GaussianPolicy(seed=5), torch.tensor([0.7, -0.3])
    set_constant(policy, raw)
    mean, log_std = policy(torch.rand(9, 1))
    assert torch.equal(mean, raw.expand(9, 2)) and (log_std == 0).all()
