"""The policy network against slow twins, and what a decision costs."""

from __future__ import annotations

import math
import statistics
import time

import pytest
import torch

from jel import GaussianPolicy, JelError, Knob, PolicyController
from jel.policy import multiplier_table
from tests.jel_parts import FEEDBACK, A, E, K, feedback_policy, generator, knobs, lively_policy, sampled

THREE = ("progress", "log_probe_loss", "log_grad_norm")


def test_a_fresh_policy_is_near_the_identity_and_as_wide_as_the_paper_says():
    policy, states = GaussianPolicy(), torch.linspace(0, 1, 21)[:, None]
    mean, log_std = policy(states)
    assert mean.shape == log_std.shape == (21, A)
    assert (policy.actions.values(mean).log().abs() < 0.1).all()
    torch.testing.assert_close(log_std, torch.full_like(log_std, -0.5), atol=0.02, rtol=0)
    torch.testing.assert_close(policy.entropy(states), torch.full((21,), 0.919), atol=0.02, rtol=0)
    assert sum(p.numel() for p in policy.parameters()) == 2 * 64 + 65 * 64 + 65 * 4


@pytest.mark.parametrize(
    "bad",
    [
        *({"initial_log_std": s} for s in (-5.1, 2.1, float("nan"))),
        *({name: n} for name in ("hidden",) for n in (0, -1, 4097, 64.0, "64", True)),
        *({"features": f} for f in ((), ("loss",), ("progress", 3), "progress")),
        *(
            {"knobs": k}
            for k in ((), (Knob("a", "lr"), Knob("a", "lr")), (Knob("a", "b1", scale="logit", bounds=(0.1, 0.9)),))
        ),
    ],
)
def test_hyperparameters_that_make_no_sense_are_refused(bad):
    with pytest.raises(JelError, match=next(iter(bad)).rstrip("s")) as e:
        GaussianPolicy(**bad)
    assert "\n" not in str(e.value)


def test_hyperparameters_are_taken():
    policy = GaussianPolicy(knobs(10.0), hidden=8, initial_log_std=-2.0)
    mean, log_std = policy(torch.zeros(1))
    torch.testing.assert_close(log_std, torch.full((A,), -2.0), atol=0.02, rtol=0)
    assert policy.net[2].weight.shape == (8, 8)
    for sign in (-1.0, 1.0):
        with torch.no_grad():
            policy.net[4].bias[:A] = 30.0 * sign
        held = policy.mean_multipliers({"progress": 0.0})["*"]
        assert held == {"lr": pytest.approx(10.0**sign), "weight_decay": pytest.approx(10.0**sign)}


def test_policy_comes_from_its_seed_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    a, b, c = GaussianPolicy(seed=1), GaussianPolicy(seed=1), GaussianPolicy(seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.net[0].weight, b.net[0].weight) and not torch.equal(a.net[0].weight, c.net[0].weight)


def test_log_std_is_clamped():
    policy = GaussianPolicy()
    with torch.no_grad():
        policy.net[4].bias[2:] = torch.tensor([-50.0, 50.0])
    assert policy(torch.zeros(1))[1].tolist() == [-5.0, 2.0]


def test_densities_against_torch_distributions():
    policy, states = lively_policy(features=THREE), torch.rand(E, K, 3, generator=generator())
    actions, log_probs = sampled(policy, states, 5)
    mean, log_std = policy(states)
    normal = torch.distributions.Normal(mean, log_std.exp())
    assert actions.shape == (E, K, A) and not actions.requires_grad
    torch.testing.assert_close(log_probs, normal.log_prob(actions).sum(-1))
    torch.testing.assert_close(policy.log_prob(states, actions), normal.log_prob(actions).sum(-1))
    torch.testing.assert_close(policy.entropy(states), normal.entropy().mean(-1))
    again, _ = sampled(policy, states, 5)
    assert torch.equal(again, actions)
    many, _ = sampled(policy, states[:1, :1].expand(5000, 1, 3), 0)
    torch.testing.assert_close(many.mean(0), mean[0, :1], atol=0.05, rtol=0)
    torch.testing.assert_close(many.std(0), log_std[0, :1].exp(), atol=0.05, rtol=0)


@pytest.mark.parametrize("features", [("progress",), THREE])
def test_actions_do_not_depend_on_how_episodes_are_split(features):
    policy, g, n_state = lively_policy(features=features), generator(2), len(features)
    states, noise = torch.rand(40, K, n_state, generator=g), torch.randn(40, K, A, generator=g)
    actions, log_probs = policy.act(states, noise)
    mean, log_std = policy(states)
    torch.testing.assert_close(actions, mean + log_std.exp() * noise)
    torch.testing.assert_close(log_probs, policy.log_prob(states, actions))
    for size in (1, 3, 8):
        parts = [policy.act(s, n) for s, n in zip(states.split(size), noise.split(size))]
        assert all(torch.equal(whole, torch.cat(p)) for whole, p in zip((actions, log_probs), zip(*parts)))
    alone = policy.act(states[7, 5], noise[7, 5])
    assert torch.equal(alone[0], actions[7, 5]) and torch.equal(alone[1], log_probs[7, 5])
    assert policy.act(states[:0], noise[:0])[0].shape == (0, K, A)


@pytest.mark.parametrize("features", [("progress",), FEEDBACK])
def test_mean_multipliers_are_those_of_the_mean_action(features):
    policy = lively_policy(features=features, knobs=knobs(3.0))
    observed = {
        "progress": torch.rand(E, generator=generator()),
        "probe_loss": torch.rand(E, generator=generator(1)) * 9,
    }
    together = policy.mean_multipliers(observed)
    for i in range(E):
        alone = policy.mean_multipliers({name: value[i].item() for name, value in observed.items()})
        states = torch.tensor([observed["progress"][i], observed["probe_loss"][i].log()])[: len(features)]
        want = torch.exp(math.log(3.0) * torch.tanh(policy(states)[0]))
        assert list(alone["*"].values()) == pytest.approx(want.tolist(), rel=1e-5)
        assert {k: v[i].item() for k, v in together["*"].items()} == pytest.approx(alone["*"], rel=1e-5)
    assert (policy.observes == {"progress"}) == (len(features) == 1)


def test_a_table_of_multipliers_needs_a_policy_of_progress_alone():
    policy, points = lively_policy(), [0.0, 0.25, 0.5]
    table = multiplier_table(policy, points)
    assert [row["progress"] for row in table] == points
    assert [row["multipliers"] for row in table] == [policy.mean_multipliers({"progress": p}) for p in points]
    with pytest.raises(JelError, match="observes probe_loss, progress"):
        multiplier_table(feedback_policy(), points)


def test_a_decision_costs_less_than_half_a_millisecond():
    """The shipped policy, the median of 200 decisions: about 0.04 ms on a core of its own."""
    controller, seconds = PolicyController(), []
    for i in range(250):
        start = time.perf_counter()
        controller.decide({"progress": i / 250})
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds[50:]) < 5e-4
