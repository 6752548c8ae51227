"""The critic is an exact Gaussian process, and the update that follows it learns, resumes and keeps its bounds."""

from __future__ import annotations

import math

import pytest
import torch

from jel.errors import JelError
from jel.learn.critic import JITTER, Critic
from jel.learn.exploration import Exploration
from jel.recipes.jel import JelRecipe
from tests.jel_parts import FEEDBACK, QuadraticTask, generator, same

A, K, N = 3, 4, 20
CRITIC = dict(learner="critic", episodes=6, decision_interval=5, updates=6, policy_lr=1e-2, policy_steps=15)


def episodes(seed: int, n: int = N) -> torch.Tensor:
    return torch.randn(n, K, A, generator=generator(seed))


def surface(raw: torch.Tensor) -> torch.Tensor:
    """A smooth return, of the mean of each knob alone: highest at (0.5, -0.3, .)."""
    mean = torch.tanh(raw).mean(1)
    return 2 - (mean[:, 0] - 0.5).square() - 2 * (mean[:, 1] + 0.3).square()


def fitted(raw, groups, returns) -> Critic:
    critic = Critic(A)
    critic.fit(raw, groups, returns)
    return critic


def expected_reference(critic: Critic, raw, groups, returns, asked) -> float:
    """The posterior mean at one episode, entry by entry."""
    *lengths, variation, signal, group, noise = critic.hyperparameters.exp().tolist()
    x = [torch.tanh(r.double()) for r in raw]

    def kernel(a, b):
        distance = 0.0
        for j, length in enumerate(lengths):
            distance += float((a[:, j].mean() - b[:, j].mean()) ** 2) / length**2
            rest = (a[:, j] - a[:, j].mean()) - (b[:, j] - b[:, j].mean())
            distance += float(rest.square().mean()) / (length * variation) ** 2
        return signal * math.exp(-0.5 * distance)

    n = len(x)
    covariance = torch.tensor([[kernel(a, b) for b in x] for a in x], dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            covariance[i, j] += group * (groups[i] == groups[j]) + (noise + JITTER) * (i == j)
    offset, unit = returns.double().mean(), returns.double().std()
    weights = torch.linalg.solve(covariance, (returns.double() - offset) / unit)
    here = torch.tensor([kernel(torch.tanh(asked.double()), b) for b in x], dtype=torch.float64)
    return float(here @ weights * unit + offset)


def test_the_critic_equals_its_slow_twin():
    raw, groups = episodes(0), torch.arange(N) // 5
    returns = surface(raw) + 0.3 * groups
    critic, asked = fitted(raw, groups, returns), episodes(1, 3)
    for i in range(3):
        assert critic.returns(asked)[i].item() == pytest.approx(
            expected_reference(critic, raw, groups, returns, asked[i]), abs=1e-6
        )


def test_the_critic_learns_a_smooth_return_whatever_the_group_adds():
    raw, groups, asked = episodes(0, 48), torch.arange(48) // 8, episodes(1)
    plain = fitted(raw, groups, surface(raw)).returns(asked)
    shifted = fitted(raw, groups, surface(raw) + 0.5 * torch.randn(6, generator=generator(2))[groups]).returns(asked)
    for found in (plain, shifted):
        assert torch.corrcoef(torch.stack([found, surface(asked).double()]))[0, 1] > 0.97


def test_the_order_of_episodes_does_not_matter():
    raw, groups = episodes(0), torch.arange(N) // 5
    order = torch.randperm(N, generator=generator(3))
    a, b = fitted(raw, groups, surface(raw)), fitted(raw[order], groups[order], surface(raw)[order])
    assert torch.allclose(a.returns(episodes(1)), b.returns(episodes(1)), atol=1e-6)


def test_pessimism_takes_off_least_where_much_was_tried():
    raw = episodes(0)
    critic = fitted(raw, torch.zeros(N), surface(raw))
    taken = lambda asked: critic.returns(asked) - critic.returns(asked, pessimism=1.0)
    assert taken(raw).max() < taken(torch.full((1, K, A), 3.0)).min()
    assert (taken(raw) > 0).all()


@pytest.mark.parametrize("returns", [torch.tensor([1.0]), torch.tensor([1.0, float("nan"), 2.0])])
def test_returns_that_cannot_be_fitted(returns):
    with pytest.raises(JelError, match="finite returns of two episodes or more"):
        Critic(A).fit(episodes(0, len(returns)), torch.zeros(len(returns)), returns)


# -----------------------------------------------------------------------------
# the update


def make_trainer(seed=0, **choices):
    recipe = JelRecipe(**{**CRITIC, "exploration": Exploration(0.98, True), **choices})
    return recipe.trainer(QuadraticTask(floor=5.0), seed, seed, seed, 6)


def test_the_policy_learns_in_few_episodes():
    """0.02 is far too careful for this quadratic: within 36 episodes the multiplier has risen, and the return."""
    trainer = make_trainer()
    records = [trainer.update() for _ in range(6)]
    assert records[-1]["multipliers"]["*"]["lr"][0] > 3
    assert (
        records[-1]["return_mean"] / records[-1]["probe_first"] > records[0]["return_mean"] / records[0]["probe_first"]
    )
    assert records[0]["critic_error"] is None and all(r["critic_error"] > 0 for r in records[1:])
    assert records[-1]["entropy"] < records[0]["entropy"]  # the exploration narrows


def test_an_update_moves_the_policy_within_the_trust_region():
    for region in (0.1, 1.0):
        trainer = make_trainer(trust_region=region, policy_steps=100)
        assert all(trainer.update()["approx_kl"] < 1.3 * region + 0.05 for _ in range(6))


def test_resume_is_exact():
    """In the middle of learning, at the start of a second one, and between the groups that compare policies."""
    course = {"compare": 2, "updates": 8, "learnings": 2}
    whole, states = make_trainer(**course), []
    for _ in range(8):
        states.append(whole.state_dict())
        whole.update()
    for done in range(1, 8):
        other = make_trainer(**course)
        other.update()  # nothing of it may be left
        other.load_state_dict(states[done])
        for _ in range(8 - done):
            other.update()
        assert same(whole.policy, other.policy), done


def test_a_schedule_must_earn_what_it_varies():
    """Where only the sum over the run matters, a high cost of variation leaves a constant."""

    def spread(cost):
        trainer = make_trainer(variation_cost=cost)
        for _ in range(5):
            record = trainer.update()
        rates = torch.tensor(record["multipliers"]["*"]["lr"]).log()
        return float(rates.max() - rates.min())

    assert spread(10.0) < 0.2 * spread(0.0) + 0.01


def test_a_multiplier_must_earn_what_it_departs_from_the_base():
    def departure(cost):
        trainer = make_trainer(departure_cost=cost)
        for _ in range(5):
            record = trainer.update()
        return torch.tensor(record["multipliers"]["*"]["lr"]).log().abs().max()

    assert departure(10.0) < 0.2 * departure(0.0)


def test_the_best_of_the_compared_policies_stays():
    trainer = make_trainer(compare=1, updates=7)
    for _ in range(6):
        trainer.update()
    spoilt = {name: torch.zeros_like(t) for name, t in trainer.policy.state_dict().items()}
    trainer.policy.load_state_dict(spoilt)  # what the last update left is worth nothing
    trainer._kept["6"] = spoilt
    kept = dict(trainer._kept)
    record = trainer.update()
    assert record["kept_update"] < 6
    assert all(torch.equal(t, kept[str(int(record["kept_update"]))][n]) for n, t in trainer.policy.state_dict().items())


def test_several_learnings_start_afresh_and_are_compared():
    trainer = make_trainer(compare=1, updates=7, learnings=2)
    first = {name: t.clone() for name, t in trainer.policy.state_dict().items()}
    for _ in range(3):
        trainer.update()
    assert not same_weights(trainer.policy.state_dict(), first) and trainer.updater._episodes == {}
    assert spread_of_means(trainer.policy) < 0.1  # a fresh policy does nothing yet
    for _ in range(3):
        trainer.update()
    assert set(trainer._kept) == {"1", "2", "3", "4", "5", "6"}
    trainer.update()
    assert trainer.updates == trainer.planned == 7


def test_a_learning_that_stands_still_ends():
    """Every update counts as still: two are done, and the comparison."""
    trainer = make_trainer(compare=1, updates=7, still=1e9)
    while trainer.updates < trainer.planned:
        record = trainer.update()
    assert trainer.updates == 3 and "kept_update" in record
    never = make_trainer(compare=1, updates=7, still=0.0)
    while never.updates < never.planned:
        never.update()
    assert never.updates == 7


def same_weights(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def spread_of_means(policy):
    return float(policy(torch.linspace(0, 1, 5)[:, None])[0].abs().max())


@pytest.mark.parametrize("wrong", [{"updates": 3, "compare": 1, "learnings": 3}, {"learnings": 2}])
def test_learnings_that_make_no_sense(wrong):
    with pytest.raises(JelError, match="learnings"):
        make_trainer(**wrong)


def test_what_cannot_be_compared():
    with pytest.raises(JelError, match="compare 0"):
        make_trainer(compare=1, features=FEEDBACK)
    with pytest.raises(JelError, match="leave none of 6 to learn from"):
        make_trainer(compare=6)
