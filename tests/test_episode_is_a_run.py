"""An episode is a small run: given the same everything, it ends with the weights of `scripts.base_train`."""

from __future__ import annotations

import signal
import sys
from functools import partial

import pytest
import safetensors.torch
import torch

from jel import Controller, PolicyController
from jel.features import WATCHED
from jel.tasks.pretrain import PretrainTask, uniform_base
from nanochat.common import Compute, derive_seed
from nanochat.gpt import GPTConfig
from nanochat.token_cache import TokenCache
from nanochat.tokenizer import Tokenizer, tokenizer_folder
from scripts import base_train
from tests.jel_parts import lively_policy

STEPS, BATCH, SEQUENCE, SEED, INTERVAL = 12, 2, 64, 5, 4
SCHEDULE = {"warmup_ratio": 0.0, "warmdown_ratio": 0.4, "final_lr_frac": 0.0, "final_wd_frac": 0.0}
DECISIONS = [
    {"*": {"lr": 20.0, "weight_decay": 0.5}},
    {"*": {"lr": 8.0, "weight_decay": 2.0}, "lm_head": {"lr": 1.5}},
    {"*": {"lr": 30.0}},
]


class Scripted(Controller):
    """Decides what DECISIONS says."""

    observes = frozenset({"step"})

    def decide(self, observation):
        return DECISIONS[int(observation["step"]) // INTERVAL]


class Ones(Controller):
    def decide(self, observation):
        return {"*": {"lr": 1.0, "weight_decay": 1.0}}


class Watching(PolicyController):
    """A closed loop: it acts on what it sees of the optimizer, and writes down both."""

    seen: list[dict[str, float]] = []
    decided: list[dict] = []

    def __init__(self):
        super().__init__(lively_policy(features=("cos_grad_momentum", "train_fall", "log_straightness_cdf_5")))

    def attach(self, optimizer):
        super().attach(optimizer)
        statistics = self.observer.statistics
        self.observer.statistics = lambda progress: self.seen.append(statistics(progress)) or self.seen[-1]

    def decide(self, observation):
        self.decided.append(super().decide(observation))
        return self.decided[-1]


def weights_of_a_run(base, corpus, monkeypatch, controller: str) -> dict[str, torch.Tensor]:
    flags = {
        "--preset": "smoke",
        "--data": str(corpus),
        "--device-type": "cpu",
        "--hparams": "uniform",
        "--base-lr": "1e-3",
        "--base-wd": "1e-2",
        "--num-iterations": str(STEPS),
        "--max-seq-len": str(SEQUENCE),
        "--device-batch-size": str(BATCH),
        "--total-batch-size": str(BATCH * SEQUENCE),
        "--decision-interval": str(INTERVAL),
        "--controller": f"tests.test_episode_is_a_run:{controller}",
        "--eval-every": "0",
        "--save-every": "0",
        "--sample-tokens": "0",
        "--max-recoveries": "0",
        "--seed": str(SEED),
        "--model-tag": f"episode-{controller}",
    }
    monkeypatch.setattr(sys, "argv", ["base_train", *(word for pair in flags.items() for word in pair)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        assert base_train.main() == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return safetensors.torch.load_file(base / "runs" / f"episode-{controller}" / "model.safetensors")


def start_episodes(corpus, episodes: int) -> PretrainTask:
    """A task that has started so many episodes where the run starts."""
    tokenizer = Tokenizer.load(tokenizer_folder("smoke"))
    config = GPTConfig.from_depth(2, 16, 16, sequence_len=SEQUENCE, vocab_size=tokenizer.vocab_size)
    task = PretrainTask(
        config,
        TokenCache.build(corpus, tokenizer),
        Compute(0, 1, torch.device("cpu")),
        num_steps=STEPS,
        batch_size=BATCH,
        probe_batches=1,
        make_optimizer=partial(uniform_base, lr=1e-3, weight_decay=1e-2),
        schedule=SCHEDULE,
        seed=SEED,
    )
    task.start([derive_seed(SEED, "init")] * episodes, [0] * episodes)
    return task


@pytest.mark.parametrize("controller, decisions", [("Ones", [{}] * 3), ("Scripted", DECISIONS)])
def test_an_episode_ends_with_the_weights_of_a_run(base, corpus, monkeypatch, controller, decisions):
    """Side by side with an episode of another fate, whose multipliers are half as large."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    want = weights_of_a_run(base, corpus, monkeypatch, controller)
    task = start_episodes(corpus, 2)
    begun = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    for i, decision in enumerate(decisions):
        task.train(
            i * INTERVAL,
            INTERVAL,
            {
                group: {key: torch.tensor([m, m / 2], dtype=torch.float64) for key, m in own.items()}
                for group, own in (decision or {"*": {"lr": 1.0, "weight_decay": 1.0}}).items()
            },
        )
    task.close()
    found = dict(task.model.named_parameters())
    assert found.keys() <= want.keys()
    for name, p in found.items():
        assert not torch.equal(p, begun[name]) and not torch.equal(p[0], p[1]), name
        small = 1e-6 * want[name].abs().max().item()  # where batched products round as single ones, the bits are equal
        torch.testing.assert_close(p[0].detach(), want[name], rtol=1e-6, atol=small)


def test_an_episode_shows_a_watching_policy_what_a_run_shows_it(base, corpus, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    Watching.seen, Watching.decided = [], []
    weights_of_a_run(base, corpus, monkeypatch, "Watching")
    assert len(Watching.seen) == STEPS // INTERVAL
    assert Watching.decided[1] != Watching.decided[2]  # after one measured step, before any momentum, it sees little
    task = start_episodes(corpus, 2)
    for i, (seen, decided) in enumerate(zip(Watching.seen, Watching.decided)):
        found = task.observe(WATCHED)
        for name in WATCHED:
            near = 0.05 if "cdf" in name else 1e-3  # a CDF of what hardly moves magnifies rounding
            assert abs(found[name][0].item() - seen[name]) < near, (i, name)
        shared = {key: torch.tensor([m, m / 2], dtype=torch.float64) for key, m in decided["*"].items()}
        task.train(i * INTERVAL, INTERVAL, {"*": shared})
    different = [name for name in WATCHED if abs(found[name][0] - found[name][1]) > 1e-3]
    assert len(different) > 10  # the other episode sees itself
    task.close()
