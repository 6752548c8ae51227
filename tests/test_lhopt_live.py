"""LHOPT in a live loop: it sees what the batched environment shows it, and keeps the scheduler's promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import jel
from jel.errors import JelError
from jel.inner_optimizer import InnerOptimizer
from jel.learn.control import run
from jel.lhopt import PAPER_KNOBS, LhoptController
from jel.observer import Observer
from jel.policy_lstm import LstmPolicy, save_lhopt_policy
from jel.recipes.lhopt import LhoptRecipe
from jel.validation_guard import KEEP
from tests.lhopt_runs import Fixed, LiveRun, Loop, lively_policy, small_task


@pytest.mark.parametrize(
    "kind, lr, guard", [("context", 1e-3, False), ("transformer", 1e-3, True), ("context", 0.2, True)]
)
def test_it_sees_what_the_batched_environment_sees(kind, lr, guard, capsys):
    """The same features at every decision, and so the same decisions and the same weights, also under the guard.

    In double precision: a CDF of a statistic that hardly moves magnifies rounding.
    """
    torch.set_default_dtype(torch.float64)
    try:
        task, policy = small_task(kind), lively_policy().double()
        starts = torch.tensor([[lr, 1e-2, 0.1, 1e-2]])
        episode = run(policy, Fixed(task), [5], starts, 20, keep=KEEP if guard else 0)
        live = LiveRun(task, policy, lr, guard=guard)
        live.train(task.steps)
        if guard:
            live.scheduler.observe(val_loss=live.val_loss())
            live.guard.load_best(live.val_loss)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(live.features) == 20
    assert (lr > 0.1) == ("rates x 0.25" in capsys.readouterr().out)  # it went back to its best weights, or did not
    torch.testing.assert_close(torch.stack(live.features), episode.features[:, 0], rtol=1e-5, atol=1e-5)
    assert (episode.values[-1, 0] / starts[0]).log().abs().min() > 0.01  # all knobs were turned
    torch.testing.assert_close(live.loss(task.test.inputs, task.test.targets)[None], episode.final)


# -----------------------------------------------------------------------------
# in an ordinary loop


OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "inner": lambda params: InnerOptimizer(params),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_it_resumes_exactly_in_the_middle_of_a_window(make):
    whole = Loop(make).train(range(40))
    first = Loop(make).train(range(21))
    second = first.resumed(make=make).train(range(21, 40))
    assert whole.rates == first.rates + second.rates
    assert len(set(whole.rates)) > 10
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters()))
    assert whole.scheduler.recorded() == second.scheduler.recorded()


def test_watching_alone_changes_no_bit():
    def train(watch):
        loop = Loop(total=10)
        loop.scheduler.release()
        optimizer = torch.optim.AdamW(loop.model.parameters())
        observer = Observer(optimizer) if watch else None
        for step in range(10):
            loss = loop.model(torch.randn(8, 4, generator=torch.Generator().manual_seed(step))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if observer:
                observer.observe(loss=loss)
        return list(loop.model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True)))


def test_a_recorded_run_replays_without_the_policy_and_at_another_length():
    loop = Loop().train(range(40))
    schedule = loop.scheduler.recorded()
    replayed = Loop()
    replayed.scheduler.release()
    replayed.scheduler = jel.Scheduler(replayed.optimizer, 40, schedule)
    assert replayed.train(range(40)).rates == loop.rates
    assert all(torch.equal(a, b) for a, b in zip(loop.model.parameters(), replayed.model.parameters()))
    longer = Loop(total=400)
    longer.scheduler.release()
    longer.scheduler = jel.Scheduler(longer.optimizer, 400, schedule)
    rates = longer.train(range(399)).rates
    assert [rates[10 * step + 10] for step in range(38)] == loop.rates[:38]
    other = torch.optim.AdamW(loop.model.parameters(), lr=0.1)
    with pytest.raises(JelError, match="learned at lr 0.001"):
        jel.Scheduler(other, 40, schedule)


def test_long_windows_are_not_measured_more_often_than_need_be():
    for total, every in ((40, 4), (2000, 4), (20 * 3200, 100)):
        assert Loop(total=total).controller.observer.every == every


def test_the_users_bounds_hold_and_the_policy_knows():
    loop = Loop(bounds={"lr": (0.9, 1.1)}).train(range(40))
    assert all(0.9e-3 <= rate <= 1.1001e-3 for rate in loop.rates)
    assert 0.9e-3 <= float(loop.controller._values[0]) <= 1.1001e-3
    assert max(Loop().train(range(40)).rates) > 1.2e-3 or min(Loop().train(range(40)).rates) < 0.8e-3


def test_sgd_momentum_is_no_rate():
    """The buffer of torch's SGD sums; its rate is multiplied by the same factor as 1 - momentum."""
    loop = Loop(OPTIMIZERS["momentum"]).train(range(30))
    group, values, start = loop.optimizer.param_groups[0], loop.controller._values, loop.controller._start
    names = loop.controller.policy.actions.names
    ratio = dict(zip(names, (values / start).tolist()))
    assert group["momentum"] == pytest.approx(1 - 0.1 * ratio["ombeta1"])
    assert group["lr"] == pytest.approx(0.1 * ratio["lr"] * ratio["ombeta1"])
    assert ratio["ombeta2"] == 1.0


def test_the_papers_eight_knobs_turn_the_papers_optimizer():
    policy = LstmPolicy(PAPER_KNOBS, hidden=8)
    with torch.no_grad():
        policy.heads.weight.mul_(100)
    loop = Loop(lambda params: InnerOptimizer(params, 1e-2), policy=policy)
    start = dict(loop.optimizer.param_groups[0])
    loop.train(range(40))
    group = loop.optimizer.param_groups[0]
    names = ("lr", "weight_decay", "eps", "clip", "clip_decay", "norm_decay")
    moved = {name: group[name] / start[name] for name in names}
    moved |= {f"beta{i + 1}": (1 - group["betas"][i]) / (1 - start["betas"][i]) for i in range(2)}
    assert all(abs(ratio - 1) > 1e-3 for ratio in moved.values()), moved
    assert 0 < group["clip"] < 1 and all(p.isfinite().all() for p in loop.model.parameters())


def test_what_cannot_be(tmp_path):
    loop = Loop()
    loop.optimizer.step()
    loop.optimizer.step()
    with pytest.raises(JelError, match="observe\\(loss=loss\\)"):
        loop.scheduler.step()
    with pytest.raises(JelError, match="checkpoints"):
        LhoptController(LhoptRecipe(hidden=8, registers=1).policy(0))
    with pytest.raises(JelError, match="policy"):
        jel.Scheduler(torch.optim.AdamW([nn.Parameter(torch.ones(2))]), 10, LhoptController(tmp_path / "none"))
    with pytest.raises(JelError, match="attach"):
        LhoptController(lively_policy()).decide({"progress": 0.0})
    nothing = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.0)
    with pytest.raises(JelError, match="has none of them"):
        jel.Scheduler(nothing, 10, LhoptController(lively_policy()))
    assert not nothing._optimizer_step_pre_hooks
    other = Loop(policy=lively_policy(1))
    with pytest.raises(JelError, match="was controlled by policy"):
        other.scheduler.load_state_dict(Loop().train(range(4)).scheduler.state_dict())


def test_a_saved_policy_is_named_by_its_path(tmp_path):
    save_lhopt_policy(lively_policy(), tmp_path / "mine", {}, decisions=4)
    controller = LhoptController(tmp_path / "mine")
    assert controller.decision_steps(10) == [0, 2, 5, 8]
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    scheduler = jel.Scheduler(optimizer, 10, str(tmp_path / "mine.json"))
    assert isinstance(scheduler.controller, LhoptController)
