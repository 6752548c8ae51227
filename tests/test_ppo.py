"""PPO for LHOPT: its parts against slow twins, and a whole loop that is the same however it is run."""

import math

import pytest
import torch

from jel.errors import JelError
from jel.learn.control import Best, Registers, Trajectories, boundaries, run
from jel.learn.control_meta import Episode, Job, run_group
from jel.learn.ppo import PPOConfig, gae, group_mean
from jel.learn.speedup import fit_power_law, last_points, log_speedup
from jel.recipes.lhopt import LhoptRecipe
from jel.tasks.small.bank import SETTINGS, BankTask
from jel.tasks.small.episodes import DEFAULTS
from jel.tasks.small.kinds import draw


def some_tasks():
    """Two tasks of the bank, with baselines made up: what they are does not matter here."""
    losses = torch.linspace(1, 0.5, len(SETTINGS))[:, None].expand(-1, 8)
    return [BankTask({**draw(kind, 0), "steps": 12}, losses) for kind in ("quadratic", "tabular")]


def recipe(**changes):
    episode = Episode(decisions=4, groups=2, episodes=4, **changes.pop("episode", {}))
    return LhoptRecipe(hidden=8, updates=3, episode=episode, **changes)


def test_gae_is_its_sum():
    rewards, values = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    gamma, lam = 0.9, 0.8
    after = torch.cat([values[1:], torch.zeros(1, 3)])
    delta = rewards + gamma * after - values
    expected = torch.stack([sum((gamma * lam) ** (j - k) * delta[j] for j in range(k, 5)) for k in range(5)])
    torch.testing.assert_close(gae(rewards, values, gamma, lam), expected)
    total = rewards.flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(gae(rewards, values, 1.0, 1.0), total - values)  # lambda 1: return minus value


def test_a_group_mean_is_that_of_the_episodes_of_the_group():
    assert group_mean(torch.tensor([1.0, 3.0, 10.0]), [7, 7, 2]).tolist() == [2.0, 2.0, 10.0]
    rows = torch.tensor([[1.0, 3.0, 10.0], [0.0, -2.0, 5.0]])
    assert group_mean(rows, [7, 7, 2]).tolist() == [[2.0, 2.0, 10.0], [-1.0, -1.0, 5.0]]


def test_a_group_has_one_task_and_one_seed():
    """What all of a group's episodes gain or lose together teaches nothing."""
    _, seeds, starts, _, _ = Job(0, 3, 1).draw(some_tasks(), Episode(episodes=6))
    assert len(seeds) == 6 and len(set(seeds)) == 1 and len(starts.unique(dim=0)) > 3
    assert Job(0, 3, 0).draw(some_tasks(), Episode())[1][0] != seeds[0]
    ends = []
    for gift in (0.0, 2.0):
        trainer = recipe(ppo=PPOConfig(value_coef=0.0, max_grad_norm=1e9)).trainer(some_tasks(), 0)
        group = run_group(Job(0, 0, 0), trainer.ppo.policy, None, some_tasks(), trainer.episode)
        trainer.ppo.update(group.trajectories, group.returns + gift, [0] * 4)
        ends.append(trainer.ppo.policy.state_dict())
    for a, b in zip(*(end.values() for end in ends)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_power_law_is_found_again_and_its_speedup():
    times = torch.linspace(0, 200, 21)
    curve = 3 * times.clamp_min(1) ** -0.4
    log_a, alpha = fit_power_law(*last_points(curve, 200.0))
    assert math.isclose(alpha, -0.4, abs_tol=1e-3) and math.isclose(log_a, math.log(3), abs_tol=1e-2)
    half = 3 * 100.0**-0.4  # where the curve is at half the time
    gains = log_speedup(torch.tensor([half, 3 * 200.0**-0.4, 1e-9, math.nan, 1e9]), 200.0, log_a, alpha)
    expected = torch.tensor([math.log(0.5), 0.0, math.log(2), -3.0, -3.0])
    torch.testing.assert_close(gains, expected, atol=0.02, rtol=0)


def test_a_curve_that_does_not_fall_gives_no_endless_speedup():
    log_a, alpha = fit_power_law(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 1.0, math.nan]))
    assert alpha < 0 and log_speedup(torch.tensor([0.9]), 3.0, log_a, alpha).isfinite().all()


def test_decisions_cover_the_run():
    for steps, decisions in ((60, 20), (61, 20), (7, 7), (333, 20)):
        edges = boundaries(steps, decisions)
        assert edges[0] == 0 and edges[-1] == steps and all(a < b for a, b in zip(edges, edges[1:]))


def test_the_group_does_not_change_what_a_policy_does():
    """One episode alone is the episode in its group, choices being the policy's own."""
    task, policy = some_tasks()[1], recipe().policy(0)
    starts = torch.tensor(DEFAULTS).repeat(3, 1) * torch.tensor([[1.0], [3.0], [0.3]])
    together = run(policy, task, [1, 2, 3], starts, 4)
    alone = run(policy, task, [2], starts[1:2], 4)
    torch.testing.assert_close(together.val[:, 1], alone.val[:, 0], atol=1e-4, rtol=1e-3)
    assert together.features.shape == (4, 3, policy.n_features) and together.score.shape == (3,)


def test_hidden_validation_is_not_seen():
    task, policy = some_tasks()[1], recipe().policy(0)
    seen = run(policy, task, [1], torch.tensor([DEFAULTS]), 4, hide_val=True).features
    names = policy.features
    assert (seen[..., names.index("val_unknown")] == 1).all()
    assert (seen[..., [i for i, name in enumerate(names) if "val_fall" in name or "val_drop" in name]] == 0).all()


def test_the_best_weights_on_validation_are_kept_for_each_episode():
    best = Best(3, keep=1)
    vals = torch.tensor([[2.0, 2.0, math.nan], [1.0, 3.0, 5.0], [1.5, math.nan, math.inf], [math.nan, 2.0, 4.0]])
    for k, val in enumerate(vals):
        best.see(torch.full((3, 2), float(k)), val)
    assert best.flat[0, :, 0].tolist() == [1.0, 0.0, 3.0]  # the first of equals; what is not finite is never the best
    assert best.val.tolist() == [[1.0, 2.0, 4.0]]


def test_a_run_ends_with_the_mean_of_its_best_weights_where_that_is_no_worse():
    """Against the same said plainly, an episode at a time: bowls, in which a mean is good, and a ring, in which not."""
    bowl, ring = (lambda w: w.square().sum(-1)), (lambda w: (w.norm(dim=-1) - 1).abs())

    class Episodes:
        def __init__(self, flat, loss):
            self.flat, self.loss = flat, loss

        def evaluate(self, split):
            assert split == "val"
            return self.loss(self.flat)

    generator = torch.Generator().manual_seed(3)
    for loss in (bowl, ring):
        seen = [torch.randn(6, 2, generator=generator) for _ in range(7)]
        seen = [w / w.norm(dim=-1, keepdim=True) + 0.01 * w if loss is ring else w for w in seen]
        best = Best(6, keep=3)
        for w in seen:
            best.see(w, loss(w))
        episodes = Episodes(seen[-1], loss)
        best.load(episodes)
        for e in range(6):
            three = sorted((w[e] for w in seen), key=loss)[:3]
            mean = torch.stack(three).mean(0)
            expected = mean if loss(mean) <= loss(three[1]) else three[0]
            torch.testing.assert_close(episodes.flat[e], expected)
        assert loss is ring or (loss(episodes.flat) < best.val.amin(0)).any()
    lost = Episodes(torch.ones(2, 2), bowl)
    never = Best(2, keep=3)
    never.see(torch.zeros(2, 2), torch.tensor([math.nan, 1.0]))
    never.load(lost)
    assert lost.flat.tolist() == [[1.0, 1.0], [0.0, 0.0]]  # nothing to go back to; fewer than three


def test_keeping_the_best_changes_how_a_run_ends_and_nothing_else():
    task, policy = some_tasks()[1], recipe().policy(0)
    starts = torch.tensor(DEFAULTS).repeat(6, 1) * torch.tensor([1.0, 10.0, 100.0, 300.0, 1000.0, 1e6])[:, None]
    plain, kept = (run(policy, task, range(6), starts, 4, keep=keep, retreats=0) for keep in (0, 5))
    torch.testing.assert_close(plain.val, kept.val, equal_nan=True)
    torch.testing.assert_close(plain.features, kept.features, equal_nan=True)
    changed = plain.final != kept.final
    assert changed.any() and not changed.all()  # what still improved at the end stays
    assert (kept.final[-2:] < plain.final[-2:].nan_to_num(math.inf)).all()  # what blew up does not


def test_ranks_share_the_groups_and_put_them_back_in_order(monkeypatch):
    made = LhoptRecipe(hidden=8, updates=1, episode=Episode(groups=5))
    ranks = [made.trainer(some_tasks(), 0, 1, rank, 2) for rank in range(2)]
    parts = [list(range(5))[rank::2] for rank in range(2)]
    gather = lambda out, mine: out.__setitem__(slice(None), parts)
    monkeypatch.setattr("jel.learn.control_meta.dist.all_gather_object", gather)
    for rank, trainer in enumerate(ranks):
        assert trainer._from_all_ranks(parts[rank]) == list(range(5))


def states_equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(states_equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("reward", ["score", "both"])
def test_stopped_and_resumed_ends_with_the_same_bits(reward):
    tasks, made = some_tasks(), recipe(episode={"reward": reward})
    whole = made.trainer(tasks, 0)
    for _ in range(3):
        whole.update()
    first, second = made.trainer(tasks, 0), made.trainer(tasks, 0)
    first.update()
    second.ppo.load_state_dict(first.ppo.state_dict())
    second.update(), second.update()
    assert states_equal(second.ppo.state_dict(), whole.ppo.state_dict())


@pytest.mark.parametrize(
    "changes", [{"recurrent": False}, {"end_weights": ()}, {"registers": 1}, {"knobs": ("lr",), "paper_steps": True}]
)
def test_each_part_can_be_left_out(changes):
    trainer = recipe(**changes).trainer(some_tasks(), 0)
    record = trainer.update()
    assert math.isfinite(record["score"]) and math.isfinite(record["critic"])


def test_learning_raises_the_return_of_a_bandit():
    """Returns that pay for one choice of the first knob: its probability rises."""
    trainer = recipe().trainer(some_tasks(), 0)
    ppo, policy = trainer.ppo, trainer.ppo.policy
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 64, policy.n_features, generator=generator)
    chance = lambda: policy.log_probs(x, policy.initial_state((64,)))[0][0][..., 0].exp().mean().item()
    before = chance()
    for _ in range(15):
        heads, _ = policy.log_probs(x, policy.initial_state((64,)))
        draw_one = lambda h: torch.multinomial(h.exp().flatten(0, 1), 1, generator=generator).view(4, 64)
        choices = torch.stack([draw_one(h.detach()) for h in heads], -1)
        paid = (choices[..., 0] == 0).float().mean(0)
        zero = torch.zeros(4, 64)
        privileged = torch.zeros(4, 64, 12 + 2)
        ppo.update(Trajectories(x, choices, zero, privileged, zero, zero, paid, paid), paid, [0] * 64)
    assert chance() > 2 * before


def test_a_return_that_is_not_finite_is_refused():
    ppo = recipe().trainer(some_tasks(), 0).ppo
    with pytest.raises(JelError, match="not finite"):
        x = torch.zeros(2, 1, ppo.policy.n_features)
        zero = torch.zeros(2, 1)
        one = torch.zeros(2, 1, len(ppo.policy.sizes), dtype=torch.long)
        ppo.update(Trajectories(x, one, zero, torch.zeros(2, 1, 14), zero, zero, zero[0], zero[0]), zero[0] / 0, [0])


def test_registers_show_their_loss_and_age_when_they_hold_something():
    registers, policy = Registers(1, 2), recipe(registers=1).policy(0)

    class Recorder:
        def save(self, slot, episodes): ...
        def load(self, slot, episodes): ...

    assert (registers.features(torch.ones(2), 0.5) == 0).all()
    registers.act(policy, Recorder(), torch.tensor([1, 0]), torch.tensor([2.0, 2.0]), 0.25)
    shown = registers.features(torch.ones(2), 0.5)
    torch.testing.assert_close(shown[0], torch.tensor([math.tanh(math.log(2)), 0.25]))
    assert (shown[1] == 0).all()


@pytest.mark.slow
def test_two_workers_end_with_the_same_bits():
    tasks = some_tasks()
    one, two = recipe().trainer(tasks, 0), recipe().trainer(tasks, 0, workers=2)
    for _ in range(2):
        alone, shared = one.update(), two.update()
        assert shared["core_seconds"] > alone["core_seconds"] / 3  # what the workers compute is counted
    two.close()
    assert states_equal(one.ppo.state_dict(), two.ppo.state_dict())
