"""Environments and rollouts: what an episode does depends on its index alone, and a policy acts on what it sees."""

from __future__ import annotations

import threading

import pytest
import torch

from jel import GaussianPolicy
from jel.learn.env import Env, decision_steps
from jel.learn.rollout import Interrupted, RewardConfig, collect
from tests.jel_parts import FEEDBACK, NAN, A, QuadraticTask, feedback_policy, generator, sampled

EPISODES, DECISIONS = 6, 5
FIELDS = ("states", "actions", "log_probs", "rewards", "alive", "probe_losses")
POLICIES = pytest.mark.parametrize("make_policy", [GaussianPolicy, feedback_policy])


def rollout(policy, chunk, reward=None, rank=0, world_size=1, task=None, stop=lambda: False):
    reward = reward or RewardConfig(0.01, 0.1)
    env = Env(task or QuadraticTask(), policy.actions, policy.features, 5, reward.measured)
    noise = torch.randn(EPISODES, DECISIONS, A, generator=generator(1))
    return collect(env, policy, 3, noise, chunk, reward, rank, world_size, stop)


class Recording(QuadraticTask):
    """Keeps what it was asked to train and to observe."""

    def __init__(self):
        super().__init__()
        self.trained, self.asked = [], []

    def train(self, first_step, steps, multipliers):
        self.trained.append((first_step, steps, multipliers))
        super().train(first_step, steps, multipliers)

    def observe(self, names):
        self.asked.append(tuple(names))
        return super().observe(names)


def test_decisions_cover_the_episode_and_the_papers_are_twelve():
    assert decision_steps(23, 5) == [(0, 5), (5, 5), (10, 5), (15, 5), (20, 3)]
    assert decision_steps(3, 5) == [(0, 3)]
    papers = decision_steps(561, 50)
    assert len(papers) == 12 and papers[-1] == (550, 11)


def test_an_environment_observes_acts_trains_and_observes_again():
    task, policy = Recording(), feedback_policy()
    env = Env(task, policy.actions, policy.features, 5, ("probe_loss", "grad_norm"))
    state, losses = env.reset(3, range(2, 5)), []
    for k, (first, steps) in enumerate(env.decisions(3)):
        assert torch.equal(env.readings["probe_loss"], task.x.square())
        torch.testing.assert_close(state, torch.stack([torch.full((3,), first / 23), task.x.square().log()], 1))
        losses.append(env.readings["probe_loss"])
        raw = torch.full((3, A), 0.1 * k)
        state = env.step(raw)
        assert task.trained[-1][:2] == (first, steps)
        assert torch.equal(task.trained[-1][2]["*"]["lr"], policy.actions.multipliers(raw)["*"]["lr"])
    assert task.asked == [("grad_norm", "probe_loss")] * 6 and state[0, 0] == 1.0
    assert set(env.readings) == {"grad_norm", "probe_loss"}  # the clock is no reading


def test_nothing_is_measured_that_nobody_needs():
    task, policy = Recording(), GaussianPolicy()
    env = Env(task, policy.actions, policy.features, 5, ())
    assert env.reset(0, range(3)).tolist() == [[0.0]] * 3 and task.asked == [()]


def test_a_feedback_policy_acts_on_what_it_sees():
    """Each action is the policy's own at the state it saw, and states differ with the episodes' losses."""
    policy = feedback_policy()
    found = rollout(policy, EPISODES)
    torch.testing.assert_close(found.states[..., 1], found.probe_losses[:, :-1].log())
    assert len(set(found.states[:, 0, 1].tolist())) == EPISODES
    noise = torch.randn(EPISODES, DECISIONS, A, generator=generator(1))
    mean, log_std = policy(found.states)
    torch.testing.assert_close(found.actions, mean + log_std.exp() * noise)
    torch.testing.assert_close(found.log_probs, policy.log_prob(found.states, found.actions))
    assert mean[:, 2].std(dim=0).min() > 1e-2  # at one decision the episodes are treated differently
    blind = Recording()  # the same episodes, but whoever looks sees 0
    blind.observe = lambda names: {name: torch.full_like(blind.x, NAN) for name in names}
    assert not torch.equal(rollout(policy, EPISODES, task=blind).actions, found.actions)


@POLICIES
@pytest.mark.parametrize("chunk", [1, 2, 4, 5])
def test_chunks_change_nothing(make_policy, chunk):
    whole, parts = rollout(make_policy(), EPISODES), rollout(make_policy(), chunk)
    for name in FIELDS:
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name


@POLICIES
@pytest.mark.parametrize("world_size", [2, 4, 7])
def test_ranks_change_nothing(monkeypatch, make_policy, world_size):
    """Each rank runs its share; the sum over ranks is the single rank's rollout (a threaded all-reduce stands in)."""
    barrier, parts, lock = threading.Barrier(world_size), [], threading.Lock()

    def summed(record):
        with lock:
            parts.append(record.clone())
        barrier.wait()
        return sum(parts)

    monkeypatch.setattr("jel.learn.rollout._sum_over_ranks", summed)
    results = [None] * world_size

    def work(rank):
        results[rank] = rollout(make_policy(), 2, rank=rank, world_size=world_size)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    [t.start() for t in threads], [t.join() for t in threads]
    single = rollout(make_policy(), EPISODES)
    for found in results:
        for name in FIELDS:
            assert torch.equal(getattr(found, name), getattr(single, name)), name


def test_rewards_are_the_improvement_of_the_probe_loss():
    found = rollout(GaussianPolicy(), 4, RewardConfig(), task=QuadraticTask(floor=5.0))  # no rise is a blow-up
    losses = found.probe_losses
    assert found.alive.all()
    assert torch.allclose(found.rewards, losses[:, :-1] - losses[:, 1:])
    assert torch.allclose(found.states[0, :, 0], torch.tensor([0, 5, 10, 15, 20]) / 23)


def test_a_stop_is_asked_for_at_every_decision():
    for calls in (0, 3, 3 * DECISIONS - 1):
        answers = iter([False] * calls + [True])
        with pytest.raises(Interrupted):
            rollout(GaussianPolicy(), 2, stop=lambda answers=answers: next(answers))
    answers = iter([False] * 3 * DECISIONS)
    rollout(GaussianPolicy(), 2, stop=lambda: next(answers))
    assert next(answers, None) is None


def test_a_sampled_action_is_the_mean_plus_its_noise():
    policy, states = feedback_policy(), torch.rand(3, 4, len(FEEDBACK), generator=generator())
    actions, _ = sampled(policy, states, 7)
    mean, log_std = policy(states)
    noise = torch.randn(3, 4, A, generator=generator(7))
    torch.testing.assert_close(actions, mean + log_std.exp() * noise)
