"""Runs of small models under "lhopt", in an ordinary training loop."""

from __future__ import annotations

import io
from dataclasses import replace

import torch
from torch import nn

import jel
from jel.inner_optimizer import InnerOptimizer
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

    def __init__(self, task, policy, lr=1e-3, seed=5, guard=False):
        twin = Episodes(task, [seed])
        self.task, self.rows = task, twin.rows[:, 0]
        self.params = [nn.Parameter(t.clone()) for t in task.model.tensors(twin.flat)]
        self.optimizer = InnerOptimizer(self.params, lr=lr, betas=(0.9, 0.99), **ADAMW)
        self.controller = LhoptController(policy)
        save = lambda: [p.detach().clone() for p in self.params]
        self.guard = jel.ValidationGuard(save, self.load) if guard else None
        self.scheduler = jel.Scheduler(self.optimizer, task.steps, self.controller, guard=self.guard or False)
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
        scale = torch.as_tensor(self.task.scale, dtype=inputs.dtype if inputs.is_floating_point() else None)
        whole = self.task.model.tensors(scale.expand(1, self.task.n_params))
        weights = [p * s for p, s in zip(self.params, whole)]
        return LOSSES[self.task.loss](self.task.model.forward(weights, inputs[None]), targets[None])[0]

    @torch.no_grad()
    def val_loss(self):
        return self.loss(self.task.val.inputs, self.task.val.targets)

    @torch.no_grad()
    def load(self, weights):
        for p, held in zip(self.params, weights):
            p.copy_(held)

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


class Loop:
    """A small network under "lhopt", on losses of its own data; `torch.save` and back is a checkpoint."""

    def __init__(self, make=None, total=40, policy=None, **options):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
        make = make or (lambda params: torch.optim.AdamW(params))
        self.optimizer = make(self.model.parameters())
        self.controller = LhoptController(policy or lively_policy())
        self.scheduler = jel.Scheduler(self.optimizer, total, self.controller, **options)
        self.rates = []

    def train(self, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            x, y = torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)
            loss = nn.functional.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.observe(
                loss=loss, **({"val_loss": loss.detach() * 1.1} if step < 100 and step % 3 == 0 else {})
            )
            self.scheduler.step()
            self.rates.append(self.optimizer.param_groups[0]["lr"])
        return self

    def parts(self):
        return self.model, self.optimizer, self.scheduler

    def resumed(self, **options):
        file = io.BytesIO()
        torch.save([part.state_dict() for part in self.parts()], file)
        file.seek(0)
        other = Loop(**options)
        for part, state in zip(other.parts(), torch.load(file, weights_only=True)):
            part.load_state_dict(state)
        return other
