"""Pretraining as an episode: eight together are eight alone, a snapshot brings back all that was learnt."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import jel
from jel.errors import JelError
from jel.fitting import FitConfig
from jel.learn.workers import ParallelTask
from jel.tasks.pretrain import PretrainTask, episode_bytes, group_names, uniform_base
from nanochat.common import Compute
from nanochat.gpt import GPTConfig
from nanochat.token_cache import TokenCache
from nanochat.tokenizer import Tokenizer, tokenizer_folder

STEPS = 6
SCHEDULE = {"warmup_ratio": 0.0, "warmdown_ratio": 0.4, "final_lr_frac": 0.0, "final_wd_frac": 0.0}
MULTIPLIERS = {
    "*": {
        "lr": torch.tensor([1.0, 20.0, 5.0]),
        "weight_decay": torch.tensor([1.0, 0.1, 30.0]),
        "1-momentum": torch.tensor([1.0, 0.3, 3.0]),
    },
    "lm_head": {"lr": torch.tensor([2.0, 10.0, 0.5])},
}


def same_length(group: int) -> int:
    return STEPS


@pytest.fixture(scope="module")
def made_of(base, corpus):
    """What a task is made of; it pickles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        tokenizer = Tokenizer.load(tokenizer_folder("smoke"))
        config = GPTConfig.from_depth(2, 16, 16, sequence_len=32, vocab_size=tokenizer.vocab_size)
        yield partial(
            PretrainTask,
            config,
            TokenCache.build(corpus, tokenizer),
            Compute(0, 1, torch.device("cpu")),
            num_steps=STEPS,
            batch_size=2,
            probe_batches=2,
            make_optimizer=partial(uniform_base, lr=1e-3, weight_decay=1e-2),
            schedule=SCHEDULE,
            seed=1,
        )


@pytest.fixture
def make_task(made_of):
    tasks = []

    def make(shared=True, workers=1):
        whole = partial(made_of, shared=shared)
        groups = group_names(made_of.args[0])
        tasks.append(whole() if workers == 1 else ParallelTask(whole, workers, groups, same_length))
        return tasks[-1]

    yield make
    for task in tasks:
        task.close()


def of(episodes: range) -> dict:
    """The multipliers of these episodes."""
    rows = slice(episodes.start, episodes.stop)
    return {group: {key: value[rows] for key, value in own.items()} for group, own in MULTIPLIERS.items()}


def run(task, episodes, group=0):
    """Probe losses (e, 3) of an episode with two decisions, and the last gradient norm (e,)."""
    task.reset(group, episodes)
    losses = [task.observe(["probe_loss"])["probe_loss"]]
    for first in (0, 3):
        task.train(first, 3, of(episodes))
        losses.append(task.observe(["probe_loss"])["probe_loss"])
    return torch.stack(losses, 1), task.observe(["grad_norm"])["grad_norm"]


def learnt(task) -> list[torch.Tensor]:
    """Copies of the weights and of the optimizer's state, the episodes first."""
    states = [t.movedim(axis, 0) for t, axis in task.optimizer.run_states()]
    return [t.detach().clone() for t in [*task.model.parameters(), *states]]


@pytest.mark.parametrize("shared", [True, False])
def test_together_is_alone(make_task, shared):
    together, norms = run(make_task(shared), range(3))
    for i in range(3):
        alone, norm = run(make_task(shared), range(i, i + 1))
        torch.testing.assert_close(alone[0], together[i], rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(norm[0], norms[i], rtol=1e-3, atol=1e-5)


def test_a_second_reset_forgets_everything(make_task):
    task = make_task()
    first = run(task, range(3))[0]
    run(task, range(3), group=5)
    assert torch.equal(run(task, range(3))[0], first)


def test_starts_are_shared_or_own_and_groups_differ(make_task):
    shared, own = (run(make_task(s), range(3))[0] for s in (True, False))
    assert (shared[:, 0] == shared[0, 0]).all()
    assert len(set(own[:, 0].tolist())) == 3
    task = make_task()
    assert run(task, range(3), group=0)[0][0, 0] != run(task, range(3), group=1)[0][0, 0]


def test_one_blow_up_leaves_the_others_alone(make_task):
    calm, _ = run(make_task(), range(3))
    task = make_task()
    task.reset(0, range(3))
    with torch.no_grad():
        task.model.lm_head.weight[1, 0, 0] = float("nan")
    for first in (0, 3):
        task.train(first, 3, MULTIPLIERS)
    losses = task.observe(["probe_loss"])["probe_loss"]
    assert losses[1].isnan() and torch.equal(losses[[0, 2]], calm[[0, 2], -1])


def test_probe_rows_are_no_training_rows(make_task):
    task = make_task()
    task.reset(0, range(1))
    rows = {tuple(row.tolist()) for i in range(200) for row in task._batch(i)[0]}
    assert not rows & {tuple(row.tolist()) for x, _ in task.probes for row in x}


# -----------------------------------------------------------------------------
# groups and observations


def test_groups_are_those_of_the_model_and_each_has_its_own_multiplier(make_task):
    task = make_task()
    task.reset(0, range(3))
    assert task.groups == tuple(group["name"] for group in task.optimizer.param_groups) and "lm_head" in task.groups
    task.train(0, 1, MULTIPLIERS)
    for group in task.optimizer.param_groups:
        own = MULTIPLIERS["lm_head" if group["name"] == "lm_head" else "*"]["lr"]
        torch.testing.assert_close(group["lr"], 1e-3 * own)
        torch.testing.assert_close(group["weight_decay"], 1e-2 * MULTIPLIERS["*"]["weight_decay"])


def test_observations_are_those_of_the_last_step_and_nan_before_it(make_task):
    task = make_task()
    for _ in range(2):  # a reset forgets them
        task.reset(0, range(3))
        before = task.observe(["train_loss", "grad_norm"])
        assert all(value.shape == (3,) and value.isnan().all() for value in before.values())
        with torch.no_grad():
            want = task.forward(*task._batch(0))
        task.train(0, 1, MULTIPLIERS)
        after = task.observe(["train_loss", "grad_norm", "probe_loss"])
        torch.testing.assert_close(after["train_loss"], want)
        for i in range(3):
            norm = torch.stack([p.grad[i].norm() for p in task.model.parameters()]).norm()
            torch.testing.assert_close(after["grad_norm"][i], norm)
    with pytest.raises(JelError, match="do not measure hessian, progress"):
        task.observe(["progress", "hessian", "probe_loss"])


def replaying(task):
    """The task's forward pass as a CUDA graph's: each call overwrites what the calls before it returned, gradients too.

    The returned loss is copied, as `nanochat.gpt.replayed` copies it.
    """
    forward = task.forward

    def replay(*batch):
        for p in task.model.parameters():
            if p.grad is not None:
                p.grad.fill_(float("nan"))
        return forward(*batch).clone()

    task.forward = replay
    return task


@pytest.mark.parametrize("names", [["grad_norm", "probe_loss"], ["probe_loss", "train_loss", "grad_norm"]])
def test_cuda_graphs_change_no_number_and_no_order_of_observations(made_of, names):
    """Bit for bit, with the flag on a CPU, and with a forward pass that overwrites as a replayed graph does."""
    found = []
    for kind in ("plain", "flag", "replayed"):
        task = made_of(cuda_graphs=kind != "plain")
        task.reset(0, range(3))
        if kind == "replayed":
            replaying(task)
        seen = [task.observe(names)]
        for first in (0, 3):
            task.train(first, 3, MULTIPLIERS)
            seen += [task.observe([name]) for name in names]
        found.append((seen, learnt(task)))
        task.close()
    (seen, states), *others = found
    assert all(value.isfinite().all() for step in seen[1:] for value in step.values())
    for other, other_states in others:
        for a, b in zip(seen, other, strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[k].nan_to_num(-1), b[k].nan_to_num(-1)) for k in a)
        assert all(torch.equal(a, b) for a, b in zip(states, other_states, strict=True))


def test_without_the_flag_a_replay_would_overwrite_the_gradients(make_task):
    """What the flag is for: a probe before the gradient norm."""
    task = make_task()
    task.reset(0, range(3))
    replaying(task).train(0, 3, MULTIPLIERS)
    assert task.observe(["probe_loss", "grad_norm"])["grad_norm"].isnan().all()


# -----------------------------------------------------------------------------
# snapshots

SOME = torch.tensor([True, False, True])


def test_load_brings_back_the_episodes_it_is_asked_for(make_task):
    task = make_task()
    task.reset(0, range(3))
    task.train(0, 3, MULTIPLIERS)
    early = learnt(task)
    task.save(0, torch.tensor([True, True, True]))
    task.train(3, 3, MULTIPLIERS)
    late = learnt(task)
    assert all(not torch.equal(a, b) for a, b in zip(early, late))  # the second three steps moved everything
    task.load(0, SOME)
    for found, a, b in zip(learnt(task), early, late, strict=True):
        assert torch.equal(found[SOME], a[SOME]) and torch.equal(found[~SOME], b[~SOME])


def test_save_keeps_the_episodes_it_is_asked_for(make_task):
    """A second save of some episodes leaves the others' first one in the slot, and other slots alone."""
    task, everyone = make_task(), torch.ones(3, dtype=torch.bool)
    task.reset(0, range(3))
    states = [learnt(task)]
    task.save(0, everyone)
    task.save(7, everyone)
    task.train(0, 3, MULTIPLIERS)
    states.append(learnt(task))
    task.save(0, SOME)
    task.train(3, 3, MULTIPLIERS)
    task.load(0, everyone)
    for found, first, second in zip(learnt(task), *states, strict=True):
        assert torch.equal(found[SOME], second[SOME]) and torch.equal(found[~SOME], first[~SOME])
    task.load(7, everyone)
    assert all(torch.equal(a, b) for a, b in zip(learnt(task), states[0]))


def test_what_was_loaded_trains_on_as_what_was_saved(make_task):
    task = make_task()
    task.reset(0, range(3))
    task.train(0, 3, MULTIPLIERS)
    task.save(0, torch.ones(3, dtype=torch.bool))
    steps = [shard.steps for shard in task.optimizer._shards]
    task.train(3, 3, MULTIPLIERS)
    want = learnt(task)
    task.load(0, torch.ones(3, dtype=torch.bool))
    for shard, count in zip(task.optimizer._shards, steps):
        shard.steps = count  # the count of steps goes on otherwise
    task.train(3, 3, MULTIPLIERS)
    assert all(torch.equal(a, b) for a, b in zip(learnt(task), want))


def test_a_slot_is_of_this_episode(make_task):
    task = make_task()
    task.reset(0, range(3))
    with pytest.raises(JelError, match="nothing was saved in slot 2"):
        task.load(2, SOME)
    task.save(2, SOME)
    task.reset(1, range(3))
    with pytest.raises(JelError, match="nothing was saved in slot 2"):
        task.load(2, SOME)


def test_snapshots_in_worker_processes_are_the_same(make_task):
    found = []
    for workers in (1, 2):
        task, seen = make_task(workers=workers), []
        task.reset(0, range(3))
        task.train(0, 3, MULTIPLIERS)
        task.save(0, SOME)
        for first in (3, 5):
            task.train(first, 1, MULTIPLIERS)
            seen.append(task.observe(["probe_loss", "train_loss", "grad_norm"]))
            task.load(0, SOME)
            seen.append(task.observe(["probe_loss"]))
        found.append(torch.stack([value for names in seen for value in names.values()]))
    torch.testing.assert_close(*found, rtol=2e-5, atol=2e-5)
    assert found[0][1:].isfinite().all()


# -----------------------------------------------------------------------------


def test_memory_grows_with_the_episode():
    small, wide = (GPTConfig.from_depth(d, sequence_len=128) for d in (6, 12))
    assert episode_bytes(small, 32) < min(episode_bytes(small, 64), episode_bytes(wide, 32))


def test_fit_learns_on_it(make_task):
    task, config = make_task(), FitConfig(updates=1, fewest=1, check_seeds=2)
    result = jel.fit(task, budget=1000.0, method="random", config=config, say=lambda line: None)
    plan = result.card["plan"]
    assert plan["episode_steps"] == task.num_steps(0) and plan["check_lengths"] == [task.num_steps(0)]
    assert result.card["kept"] in ("base", "learned") and len(result.card["returns"][0]) == 8
