"""Losses looked at one step late, as on a GPU: the same run where nothing happens, and no harm done where it does."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from nanochat.common import Compute
from nanochat.divergence_guard import DivergenceGuard, Verdict
from nanochat.gpt import GPT, GPTConfig
from nanochat.train_step import train_step
from scripts.run_state import Progress
from scripts.update_judge import UpdateJudge

CPU = Compute(0, 1, torch.device("cpu"))
T, V = 8, 70


class Second:
    """Stands for the evaluator and the loader: the loss of a good batch, under weights that may be broken."""

    compute, micro_steps, optimizer = CPU, 1, None

    def __init__(self, model):
        self.model = model

    def get(self, step, micro_step):
        return batch(step)

    @torch.no_grad()
    def training_loss(self, batches):
        return self.model(*batches[0]).item()


def batch(seed: int):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(V, (4, T), generator=g), torch.randint(V, (4, T), generator=g)


def make(late: bool):
    sizes = {"sequence_len": T, "vocab_size": V, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(**sizes, window_pattern="L"))  # a window's mask would be kept for the tests to come
    model.init_weights(torch.Generator().manual_seed(0))
    second, guard = Second(model), DivergenceGuard(8)
    return model, model.setup_optimizer(), UpdateJudge(guard, model, second, second, Progress(), True, late)


def run(late: bool, steps: int = 6, spoil: dict | None = None):
    """(model, judge, the steps as they were seen); `spoil`: what a step's loss is multiplied with."""
    model, optimizer, judge = make(late)
    seen = []
    for step in range(steps):
        judge.start_clock()
        judge.expect(step, {"*": {"lr": float(step)}}, {})
        factor = (spoil or {}).get(step, 1.0)
        train_step(lambda x, y, factor=factor: factor * model(x, y), optimizer, [batch(step)], CPU, accept=judge)
        seen += [(made, step) for made in judge.look(everything=step == steps - 1)]
    return model, judge, seen


def test_a_quiet_run_is_the_same_looked_at_late():
    """The same bits, the same losses in the same order; each but the last is seen one step after it was made."""
    (now, a, at_once), (later, b, late) = run(False), run(True)
    assert all(torch.equal(p, q) for p, q in zip(now.parameters(), later.parameters()))
    assert [made.loss for made, _ in at_once] == [made.loss for made, _ in late]
    assert [(made.step, when) for made, when in at_once] == [(i, i) for i in range(6)]
    assert [(made.step, when) for made, when in late] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 5)]
    assert all(made.multipliers == {"*": {"lr": float(made.step)}} and made.seconds > 0 for made, _ in late)
    assert vars(a.progress) == vars(b.progress) and not math.isnan(b.progress.grad_norm)
    assert a.guard.state_dict() == b.guard.state_dict()


@pytest.mark.parametrize("factor", [math.nan, math.inf, 50.0])
def test_a_spike_does_no_harm_before_it_is_seen(factor):
    """Its gradient is 0 before the optimizer's step; the guard then finds the weights sound and skips the batch."""
    model, judge, seen = run(True, spoil={4: factor})
    assert all(p.isfinite().all() for p in model.parameters())
    verdicts = [made.verdict for made, _ in seen]
    assert verdicts == [Verdict.TAKE] * 4 + [Verdict.SKIP_SPIKE, Verdict.TAKE] and judge.guard.skipped == [4]
    assert all(p.grad.any() for p in model.parameters() if p.numel() > 100)  # of step 5, which counts
    assert judge.progress.train_loss == seen[-1][0].loss


def test_the_gradient_of_a_spike_is_zero_and_that_of_a_good_loss_is_untouched():
    model, _, judge = make(True)
    for factor, kept in ((1.0, True), (math.nan, False)):
        judge.expect(0, {}, {})
        model.zero_grad()
        loss = model(*batch(0)) * factor
        loss.backward()
        before = [p.grad.clone() for p in model.parameters()]
        assert judge(loss.detach())
        for g, p in zip(before, model.parameters()):
            assert torch.equal(p.grad, g) if kept else not p.grad.any()


def test_weights_that_are_broken_send_the_run_back_and_the_step_under_way_is_forgotten():
    model, optimizer, judge = make(True)
    for step in range(4):
        judge.expect(step, {}, {})
        train_step(model, optimizer, [batch(step)], CPU, accept=judge)
        list(judge.look(everything=False))
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    verdicts = []
    for step in (4, 5):
        judge.expect(step, {}, {})
        train_step(model, optimizer, [batch(step)], CPU, accept=judge)
        verdicts += [made.verdict for made in judge.look(everything=False)]
    assert verdicts == [Verdict.TAKE, Verdict.GO_BACK]
    judge.forget()
    assert not list(judge.look(everything=True))


def test_a_step_that_was_skipped_before_is_skipped_at_once():
    _, _, judge = make(True)
    judge.guard.skipped = [7]
    assert [decides(judge, step) for step in (6, 7)] == [True, False]


def decides(judge, step):
    judge.expect(step, {}, {})
    judge.model.zero_grad()
    loss = judge.model(*batch(step))
    loss.backward()
    return judge(loss.detach())


@pytest.mark.parametrize("late", [True, False])
def test_nothing_of_a_late_step_asks_the_device_for_a_number(late):
    """Fake tensors have no numbers: whatever would wait for the device raises. At once does, which shows the test."""
    with FakeTensorMode():
        model, _, judge = make(late)
        idx, optimizer = torch.zeros(4, T, dtype=torch.int64), torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            judge.expect(step, {}, {})
            if not late:
                with pytest.raises(DataDependentOutputException):
                    train_step(model, optimizer, [(idx, idx)], CPU, accept=judge)
                return
            train_step(model, optimizer, [(idx, idx)], CPU, accept=judge)
