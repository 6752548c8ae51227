"""Pretraining as an episode: eight together are eight alone, and the controller's probes stay out of the gradients."""

from __future__ import annotations

import pytest
import torch

from jel.tasks.pretrain import PretrainTask, episode_bytes
from nanochat.common import Compute
from nanochat.gpt import GPTConfig
from nanochat.token_cache import TokenCache
from nanochat.tokenizer import Tokenizer, tokenizer_folder

SCHEDULE = {"warmup_ratio": 0.0, "warmdown_ratio": 0.4, "final_lr_frac": 0.0, "final_wd_frac": 0.0}
FACTORS = {"lr": torch.tensor([1.0, 20.0, 5.0]), "weight_decay": torch.tensor([1.0, 0.1, 30.0])}


@pytest.fixture
def make_task(base, corpus, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    tokenizer = Tokenizer.load(tokenizer_folder("smoke"))
    cache = TokenCache.build(corpus, tokenizer)
    config = GPTConfig.from_depth(2, 16, 16, sequence_len=32, vocab_size=tokenizer.vocab_size)
    tasks = []

    def make(shared=True):
        tasks.append(
            PretrainTask(
                config,
                cache,
                Compute(0, 1, torch.device("cpu")),
                num_steps=6,
                batch_size=2,
                probe_batches=2,
                base_lr=1e-3,
                base_wd=1e-2,
                schedule=SCHEDULE,
                seed=1,
                shared=shared,
            )
        )
        return tasks[-1]

    yield make
    for task in tasks:
        task.close()


def run(task, episodes, group=0):
    """Probe losses (e, 3) of an episode with two decisions, and the last gradient norm (e,)."""
    factors = {name: f[episodes.start : episodes.stop] for name, f in FACTORS.items()}
    task.reset(group, episodes)
    losses = [task.probe_loss()]
    for first in (0, 3):
        task.train(first, 3, factors)
        losses.append(task.probe_loss())
    return torch.stack(losses, 1), task.grad_norm()


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
        task.train(first, 3, FACTORS)
    losses = task.probe_loss()
    assert losses[1].isnan() and torch.equal(losses[[0, 2]], calm[[0, 2], -1])


def test_probe_rows_are_no_training_rows(make_task):
    task = make_task()
    task.reset(0, range(1))
    rows = {tuple(row.tolist()) for i in range(200) for row in task._batch(i)[0]}
    assert not rows & {tuple(row.tolist()) for x, _ in task.probes for row in x}


def test_memory_grows_with_the_episode():
    small, wide = (GPTConfig.from_depth(d, sequence_len=128) for d in (6, 12))
    assert episode_bytes(small, 32) < min(episode_bytes(small, 64), episode_bytes(wide, 32))
