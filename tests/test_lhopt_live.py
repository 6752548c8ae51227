"""LHOPT in a live loop: it sees what the batched environment shows it, and keeps the scheduler's promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import jel
from jel.inner_optimizer import InnerOptimizer
from jel.learn.control import run
from jel.lhopt import LhoptController
from jel.policy_lstm import LstmPolicy
from jel.recipes.lhopt import LhoptRecipe
from jel.tasks.small.bank import SETTINGS, BankTask
from jel.tasks.small.episodes import Episodes, Split
from jel.tasks.small.kinds import draw
from jel.tasks.small.models import LOSSES

ADAMW = {"clip": None, "denominator": "rms", "decay": "decoupled", "trust_power": 0.0, "eps": 1e-8}


def lively_policy(seed: int = 0, **choices) -> LstmPolicy:
    """A fresh policy hardly prefers a step; this one does."""
    policy = LhoptRecipe(hidden=16, **choices).policy(seed)
    norm = policy.trunk.norm
    with torch.no_grad():
        policy.heads.weight.mul_(100)
        norm.seen.fill_(1)
        for i, name in enumerate(policy.features):  # which the small tasks do not measure: the same in all of training
            if name.startswith(("above_epsilon_cdf", "clipped_cdf")):
                norm.mean[i], norm.var[i] = 0.5, 0.0
    return policy


def wide(split: Split) -> Split:
    to = lambda t: t.double() if t.is_floating_point() else t
    return Split(to(split.inputs), to(split.targets))


class LiveRun:
    """A small task in an ordinary loop; `features` are those that the policy was given, a row a decision."""

    def __init__(self, task, policy, optimizer=lambda ps: InnerOptimizer(ps, betas=(0.9, 0.99), **ADAMW), seed=5):
        twin = Episodes(task, [seed])
        self.task, self.rows = task, twin.rows[:, 0]
        self.params = [nn.Parameter(t.clone()) for t in task.model.tensors(twin.flat)]
        self.optimizer = optimizer(self.params)
        self.controller = LhoptController(policy)
        self.scheduler = jel.Scheduler(self.optimizer, task.steps, self.controller)
        self.features: list[torch.Tensor] = []
        self.watch()
        self.step = 0

    def watch(self):
        act = self.controller.policy.act

        def seen(features, *rest):
            self.features.append(features)
            return act(features, *rest)

        self.controller.policy.act = seen

    def loss(self, inputs, targets):
        weights = [p * self.task.scale for p in self.params]
        return LOSSES[self.task.loss](self.task.model.forward(weights, inputs[None]), targets[None])[0]

    @torch.no_grad()
    def val_loss(self):
        return self.loss(self.task.val.inputs, self.task.val.targets)

    def train(self, until):
        edges = self.controller.decision_steps(self.task.steps)
        if self.step == 0:
            self.scheduler.observe(val_loss=self.val_loss())
        while self.step < until:
            at = self.rows[self.step]
            loss = self.loss(self.task.train.inputs[at], self.task.train.targets[at])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1
            if self.step in edges:
                self.scheduler.observe(val_loss=self.val_loss())
            self.scheduler.observe(loss=loss)
            self.scheduler.step()


def small_task(kind: str, dtype=torch.float64, steps: int = 60):
    task = BankTask({**draw(kind, 3), "steps": steps}, torch.ones(len(SETTINGS), 2)).task
    if dtype == torch.float64:
        task = replace(task, **{name: wide(getattr(task, name)) for name in ("train", "val", "test")})
    return task


class Fixed(BankTask):
    """A task that is given instead of built."""

    def __init__(self, task):
        super().__init__({"kind": "given", "seed": 0}, torch.ones(len(SETTINGS), 2))
        object.__setattr__(self, "given", task)

    task = property(lambda self: self.given)


@pytest.mark.parametrize("kind", ["tabular", "context", "transformer"])
def test_it_sees_what_the_batched_environment_sees(kind):
    """The same features at every decision, and so the same decisions and the same weights.

    In double precision: a CDF of a statistic that hardly moves magnifies rounding.
    """
    torch.set_default_dtype(torch.float64)
    try:
        task, policy = small_task(kind), lively_policy().double()
        starts = torch.tensor([[1e-3, 1e-2, 0.1, 1e-2]])
        episode = run(policy, Fixed(task), [5], starts, 20)
        live = LiveRun(task, policy)
        live.train(task.steps)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(live.features) == 20
    torch.testing.assert_close(torch.stack(live.features), episode.features[:, 0], rtol=1e-5, atol=1e-5)
    assert (episode.values[-1, 0] / starts[0]).log().abs().min() > 0.1  # all knobs were turned
    torch.testing.assert_close(live.loss(task.test.inputs, task.test.targets)[None], episode.final)
