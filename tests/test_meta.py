"""Rollouts and the meta-training loop: what an episode does depends on its index alone, and a resume changes nothing."""

from __future__ import annotations

import threading

import pytest
import torch

from jel.learn.grpo import PolicyUpdate
from jel.learn.meta import MetaConfig, MetaTrainer
from jel.learn.rollout import Interrupted, collect, decision_steps
from jel.policy import GaussianPolicy


class QuadraticTask:
    """Gradient descent on a quadratic from a random start: the probe loss is the quadratic itself."""

    num_steps = 23

    def reset(self, group, episodes):
        starts = torch.randn(64, generator=torch.Generator().manual_seed(group))
        self.x = starts[episodes.start : episodes.stop].clone()

    def train(self, first_step, steps, factors):
        for _ in range(steps):
            self.x = self.x - 0.02 * factors["lr"] * self.x - 0.001 * factors["weight_decay"]

    def probe_loss(self):
        return self.x.square()

    def grad_norm(self):
        return self.x.abs()


def make_trainer(seed=0, stop=lambda: False, **overrides):
    policy = GaussianPolicy(seed=seed)
    updater = PolicyUpdate(
        policy, lr=3e-3, gamma=0.99, clip=0.2, epochs=4, minibatch_size=16, entropy_coef=0.0, seed=seed
    )
    config = MetaConfig(
        **{
            "episodes": 6,
            "chunk": 6,
            "decision_interval": 5,
            "lambda_g": 0.0,
            "lambda_s": 0.0,
            "nan_penalty": None,
            **overrides,
        }
    )
    return MetaTrainer(QuadraticTask(), policy, updater, config, seed, stop_requested=stop)


def rollout(chunk, lambda_g=0.0, rank=0, world_size=1):
    return collect(
        QuadraticTask(),
        GaussianPolicy(),
        3,
        6,
        chunk,
        5,
        torch.Generator().manual_seed(1),
        lambda_g,
        0.1,
        None,
        rank,
        world_size,
    )


def test_decisions_cover_the_episode_and_the_papers_are_twelve():
    assert decision_steps(23, 5) == [(0, 5), (5, 5), (10, 5), (15, 5), (20, 3)]
    papers = decision_steps(561, 50)
    assert len(papers) == 12 and papers[-1] == (550, 11)


@pytest.mark.parametrize("chunk", [1, 2, 4, 5])
def test_chunks_change_nothing(chunk):
    (whole, losses), (parts, part_losses) = rollout(6, 0.01), rollout(chunk, 0.01)
    assert torch.equal(losses, part_losses)
    for name in ("states", "actions", "log_probs", "rewards", "alive"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name


@pytest.mark.parametrize("world_size", [2, 4, 7])
def test_ranks_change_nothing(monkeypatch, world_size):
    """Each rank runs its share; the sum over ranks is the single rank's rollout (a threaded all-reduce stands in)."""
    barrier, parts, lock = threading.Barrier(world_size), [], threading.Lock()

    def summed(readings):
        with lock:
            parts.append(readings)
        barrier.wait()
        return sum(parts)

    monkeypatch.setattr("jel.learn.rollout._sum_over_ranks", summed)
    results = [None] * world_size
    threads = [
        threading.Thread(target=lambda r=r: results.__setitem__(r, rollout(2, 0.01, r, world_size)))
        for r in range(world_size)
    ]
    [t.start() for t in threads], [t.join() for t in threads]
    single, losses = rollout(6, 0.01)
    for found, found_losses in results:
        assert torch.equal(found.rewards, single.rewards) and torch.equal(found_losses, losses)


def test_rewards_are_the_improvement_of_the_probe_loss():
    found, losses = collect(
        QuadraticTask(), GaussianPolicy(), 0, 4, 4, 5, torch.Generator().manual_seed(0), 0.0, 0.0, 100.0
    )
    assert found.alive.all()  # with so large a penalty, no rise counts as a blow-up
    assert torch.allclose(found.rewards[found.alive], (losses[:, :-1] - losses[:, 1:])[found.alive])
    assert torch.allclose(found.states[0, :, 0], torch.tensor([0, 5, 10, 15, 20]) / 23)


def test_an_update_is_all_or_nothing():
    """Interrupted in the middle of a group and run again, the result is bit for bit that of the undisturbed loop."""
    calm, calls = make_trainer(), iter([False] * 7 + [True])
    disturbed = make_trainer(stop=lambda: next(calls, False))
    calm.update(), calm.update()
    disturbed.update()
    with pytest.raises(Interrupted):
        disturbed.update()
    assert disturbed.updates == 1
    disturbed.update()
    assert all(torch.equal(a, b) for a, b in zip(calm.policy.parameters(), disturbed.policy.parameters()))


def test_resume_is_exact():
    whole, first = make_trainer(), make_trainer()
    for _ in range(5):
        whole.update()
    for _ in range(2):
        first.update()
    second = make_trainer(seed=9)  # another policy, so that everything must come from the state
    second.seed = 0
    second.load_state_dict(first.state_dict())
    records = [second.update() for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(whole.policy.parameters(), second.policy.parameters()))
    assert [r["step"] for r in records] == [2, 3, 4]


def test_the_policy_learns_to_raise_the_rate():
    """0.02 is far too careful for this quadratic: the learning-rate multiplier must rise, the return with it."""
    trainer = make_trainer(episodes=16, chunk=16)
    records = [trainer.update() for _ in range(40)]
    assert records[-1]["lr"][0] > 3
    first, last = (sum(r["return_mean"] / r["probe_first"] for r in part) for part in (records[:5], records[-5:]))
    assert last > first


def test_a_blow_up_is_counted_and_does_not_poison():
    trainer = make_trainer()
    trainer.task.probe_loss = lambda: torch.where(
        torch.arange(len(trainer.task.x)) == 2, float("nan"), trainer.task.x.square()
    )
    record = trainer.update()
    assert record["episodes_alive"] == 5
    assert all(p.isfinite().all() for p in trainer.policy.parameters())
