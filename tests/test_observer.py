"""The observer against a slow twin, for every kind of optimizer; what it promises about cost, resuming and ranks.

E episodes, M measurements.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import jel.pieces
from jel.errors import JelError
from jel.inner_optimizer import InnerOptimizer
from jel.observer import Observer
from jel.unitless import INNER, SUMS, feature_names, inner_statistics
from nanochat.optim import MuonAdamW
from tests.no_wait import NoWait

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


def test_nothing_waits_between_decisions():
    params = parameters()
    for make, _ in (OPTIMIZERS["AdamW"], OPTIMIZERS["SGD"], OPTIMIZERS["SGD with momentum"], OPTIMIZERS["inner"]):
        optimizer = make(params)
        observer = Observer(optimizer, attach=False)
        for step in range(9):
            give_gradients(params, step)
            with NoWait():
                observer.before_step()
            optimizer.step()
            with NoWait():
                observer.after_step()
                observer.observe(loss=torch.ones(()), val_loss=torch.ones(()), grad_norm=torch.ones(()))


def test_episodes_side_by_side_are_seen_as_one_by_one():
    """E runs in parameters with a leading axis: the features of each are those of a run alone."""
    alone = [parameters(seed=seed) for seed in range(3)]
    together = [nn.Parameter(torch.stack([ps[i].detach() for ps in alone])) for i in range(len(SHAPES))]
    sets = [*alone, together]
    optimizers = [torch.optim.AdamW(ps, lr=0.01) for ps in sets]
    observers = [Observer(o, runs=None if ps is not together else 3) for o, ps in zip(optimizers, sets)]
    for window in range(3):
        looks = []
        for observer in observers:
            empty = torch.zeros(0) if observer.runs is None else torch.zeros(3, 0)
            looks.append(observer.look(window / 3, empty, empty))
        assert looks[-1].shape == (3, len(feature_names(())))
        torch.testing.assert_close(torch.stack(looks[:-1]), looks[-1], rtol=1e-4, atol=1e-3)
        assert (looks[-1][0] - looks[-1][1]).abs().max() > 0.05 or window == 0
        for step in range(6):
            for seed, params in enumerate(alone):
                give_gradients(params, 100 * seed + 10 * window + step)
            for i, p in enumerate(together):
                p.grad = torch.stack([params[i].grad for params in alone])
            losses = torch.tensor([1.0, 2.0, 3.0]) / (1 + window + step)
            for optimizer, observer, loss in zip(optimizers, observers, [*losses, losses]):
                optimizer.step()
                observer.observe(loss=loss)


@pytest.mark.parametrize("early", [True, False])
def test_a_clipped_gradient_is_seen(early):
    params = parameters()
    optimizer = torch.optim.AdamW(params)
    observer = Observer(optimizer, every=1)
    index = list(INNER).index("clipped")
    for step in range(4):
        give_gradients(params, step)
        norm = nn.utils.clip_grad_norm_(params, 1.0 if step < 2 else 1e6)
        if early or step < 2:
            observer.observe(grad_norm=norm)
        optimizer.step()
    assert statistics(observer)[:, index].tolist() == [1.0, 1.0, 0.0, 0.0]


def test_the_inner_optimizer_says_when_it_clipped():
    params = parameters()
    optimizer = InnerOptimizer(params, clip=0.5, clip_decay=1e-6)
    observer = Observer(optimizer, every=1)
    for step in range(4):
        give_gradients(params, step)
        if step % 2:
            for p in params:
                p.grad *= 0.1
        optimizer.step()
    assert statistics(observer)[:, list(INNER).index("clipped")].tolist() == [1.0, 0.0, 1.0, 0.0]


def test_elements_whose_denominator_is_below_epsilon_are_counted():
    p = nn.Parameter(torch.ones(10))
    optimizer = torch.optim.AdamW([p], eps=1e-3)
    observer = Observer(optimizer, every=1)
    for _ in range(3):
        p.grad = torch.tensor([1.0] * 4 + [0.0] * 6)
        optimizer.step()
    assert statistics(observer)[:, list(INNER).index("above_epsilon")].tolist() == pytest.approx([0.4] * 3)


def test_bf16_weights_are_measured_in_fp32():
    narrow, wide = parameters(torch.bfloat16), [nn.Parameter(p.detach().float()) for p in parameters(torch.bfloat16)]
    found = []
    for params in narrow, wide:
        optimizer = torch.optim.SGD(params, lr=0.5)
        observer = Observer(optimizer, every=1)
        give_gradients(params, 0)
        optimizer.step()
        found.append(statistics(observer))
    torch.testing.assert_close(found[0], found[1], rtol=0.02, atol=0.02)


def test_scaled_gradients_of_a_fused_step_are_unscaled():
    found = []
    for scale in (None, torch.tensor(1024.0)):
        params = parameters()
        optimizer = torch.optim.AdamW(params)
        observer = Observer(optimizer, attach=False, every=1)
        for step in range(3):
            give_gradients(params, step)
            grads = [p.grad for p in params]
            for p in params:
                p.grad = p.grad * scale if scale is not None else p.grad
            optimizer.grad_scale = scale
            observer.before_step()
            del optimizer.grad_scale  # what GradScaler sets around a fused step
            for p, g in zip(params, grads):
                p.grad = g
            optimizer.step()
            for p in params:
                p.grad = p.grad * scale if scale is not None else p.grad
            observer.after_step()
        found.append(statistics(observer))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_a_state_that_trained_before_has_settled():
    """Attached late, an observer takes the averages to hold what they can hold."""
    params = parameters()
    optimizer = torch.optim.AdamW(params)
    early, rows = Observer(optimizer, every=1), []
    for step in range(101):
        if step == 100:
            late = Observer(optimizer, every=1)
        give_gradients(params, step)
        optimizer.step()
    rows = statistics(early)[-1], statistics(late)[-1]
    torch.testing.assert_close(*rows, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_watched():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    watching = Observer(optimizer)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(JelError, match="sparse"):
        optimizer.step()
    watching.close()
    optimizer.step()
    with pytest.raises(JelError, match="every is 0"):
        Observer(torch.optim.SGD(parameters(), lr=0.1), every=0)
    with pytest.raises(JelError, match="torch optimizer, not list"):
        Observer([])
    one, other = (Observer(torch.optim.SGD(parameters(shapes=s), lr=0.1)) for s in (SHAPES, SHAPES[:2]))
    none = torch.zeros(0)
    one.look(0.0, none, none)
    with pytest.raises(JelError, match="other sizes"):
        other.load_state_dict(one.state_dict())


def test_parameters_may_be_frozen_and_thawed():
    """The way since the last decision is then unknown for that group, for one decision; a state goes through it too."""
    params, none = parameters(), torch.zeros(0)
    optimizer = torch.optim.SGD(params, lr=0.1)
    observer = Observer(optimizer)
    for step, frozen in enumerate((0, 2, 0, 0)):
        for k, p in enumerate(params):
            p.requires_grad_(k >= frozen)
            p.grad = torch.ones_like(p) if k >= frozen else None
        optimizer.step()
        assert observer.look(step / 4, none, none).isfinite().all()
        other = Observer(torch.optim.SGD([p.detach().clone().requires_grad_() for p in params], lr=0.1))
        other.load_state_dict(observer.state_dict())
        assert torch.equal(other._anchor[0][0], observer._anchor[0][0])


def test_close_takes_the_hooks_away():
    params = parameters()
    optimizer = torch.optim.AdamW(params)
    observer = Observer(optimizer)
    give_gradients(params, 0)
    optimizer.step()
    observer.close()
    optimizer.step()
    assert observer.steps == 1
