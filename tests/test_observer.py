"""The observer against a slow twin, for every kind of optimizer; what it promises about cost, resuming and ranks.

E episodes, M measurements.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import jel.pieces
from jel.inner_optimizer import InnerOptimizer
from jel.observer import Observer
from jel.unitless import SUMS, inner_statistics
from nanochat.optim import MuonAdamW

WIDE = torch.float64
SHAPES = ((6, 4), (6, 4), (5,), (3, 2))


def parameters(dtype=torch.float32, seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def give_gradients(params, step, drift=0.3):
    """Gradients with something in common from step to step."""
    for i, p in enumerate(params):
        always = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + i))
        p.grad = (drift * always + noise).to(p.dtype)


def muon_adamw(params):
    groups = [
        {"params": params[:2], "kind": "muon", "name": "matrices", "lr": 0.02, "momentum": 0.9, "beta2": 0.95},
        {"params": params[2:], "kind": "adamw", "name": "rest", "lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-10},
    ]
    return MuonAdamW([{**group, "weight_decay": 0.1} for group in groups])


# name -> (optimizer of these parameters, how much its average of a group's gradients keeps)
OPTIMIZERS = {
    "AdamW": (lambda ps: torch.optim.AdamW(ps, lr=0.01), lambda group: 0.9),
    "amsgrad": (lambda ps: torch.optim.Adam(ps, lr=0.01, amsgrad=True, betas=(0.7, 0.9)), lambda group: 0.7),
    "Adamax": (lambda ps: torch.optim.Adamax(ps, lr=0.01), lambda group: 0.9),
    "NAdam": (lambda ps: torch.optim.NAdam(ps, lr=0.01), lambda group: 0.9),
    "SGD with momentum": (lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.8), lambda group: 0.8),
    "SGD": (lambda ps: torch.optim.SGD(ps, lr=0.1, weight_decay=0.1), lambda group: 0.9),
    "RMSprop": (lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.5), lambda group: 0.9),
    "Muon": (lambda ps: torch.optim.Muon([p for p in ps if p.dim() == 2], lr=0.01), lambda group: 0.95),
    "inner": (lambda ps: InnerOptimizer(ps, lr=0.01, clip=None), lambda group: 0.9),
    "MuonAdamW": (muon_adamw, lambda group: group["momentum"] if group["kind"] == "muon" else 0.8),
}


def flat(tensors):
    return torch.cat([t.detach().double().flatten() for t in tensors])


class SlowTwin:
    """Everything in one flat vector, and the average of gradients from the gradients themselves."""

    def __init__(self, optimizer, keep, every):
        self.groups, self.keep, self.every, self.steps, self.rows = optimizer.param_groups, keep, every, 0, []
        self.seen: list[list[torch.Tensor]] = [[] for _ in self.groups]

    def step(self, optimizer):
        params = [p for group in self.groups for p in group["params"]]
        p, g, m = flat(params), flat([p.grad for p in params]), []
        for group, seen in zip(self.groups, self.seen):
            weights = [self.keep(group) ** k for k in range(len(seen))][::-1]
            new = flat([p.grad for p in group["params"]])
            m.append(sum(w * old for w, old in zip(weights, seen)) / sum(weights) if seen else torch.zeros_like(new))
            seen.append(new)
        optimizer.step()
        d, m = p - flat(params), torch.cat(m)
        if self.steps % self.every == 0:
            named = dict(zip("gmpd", (g, m, p, d)))
            sums = {a + b: (named[a] @ named[b]).float() for a in "gmpd" for b in "gmpd"}
            count = torch.tensor(float(len(p)))
            sums |= {"abs_d": d.abs().sum().float(), "n": count, "clipped": torch.zeros(()), "above_epsilon": count}
            self.rows.append(inner_statistics(sums))
        self.steps += 1


def statistics(observer):
    """(M, I)."""
    rows = torch.stack(observer._rows)[:, :, 0]
    return inner_statistics({name: rows[:, k] for k, name in enumerate(SUMS)})


@pytest.mark.parametrize("make, keep", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_equals_its_slow_twin(make, keep, monkeypatch):
    monkeypatch.setattr(jel.pieces, "CPU_PIECE", 10)  # so that tensors are cut and packed
    params = parameters()
    optimizer = make(params)
    observer, twin = Observer(optimizer), SlowTwin(optimizer, keep, 4)
    for step in range(10):
        give_gradients(params, step)
        twin.step(optimizer)
    assert len(twin.rows) == 3
    torch.testing.assert_close(statistics(observer), torch.stack(twin.rows), rtol=1e-4, atol=1e-4)
    assert not torch.equal(statistics(observer)[1], statistics(observer)[2])
