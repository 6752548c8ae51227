"""LHOPT in a live loop: it sees what the batched environment shows it, and keeps the scheduler's promises."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import replace

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


@pytest.mark.parametrize("kind", ["context", "transformer"])
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
    assert (episode.values[-1, 0] / starts[0]).log().abs().min() > 0.01  # all knobs were turned
    torch.testing.assert_close(live.loss(task.test.inputs, task.test.targets)[None], episode.final)


# -----------------------------------------------------------------------------
# in an ordinary loop


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


# -----------------------------------------------------------------------------
# safety


def guarded(**options):
    """A loop whose guard keeps its weights, and the guard."""
    kept = {}
    guard = jel.ValidationGuard(
        save=lambda: {k: t.clone() for k, t in kept["model"].state_dict().items()},
        load=lambda state: kept["model"].load_state_dict(state),
        **options,
    )
    loop = Loop(guard=guard)
    kept["model"] = loop.model
    return loop, guard


def same(model, state):
    return all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_the_best_weights_on_validation_are_kept():
    loop, guard = guarded()
    states = []
    for step, val in enumerate((3.0, 1.0, 2.0, 1.4)):
        states.append({k: t.clone() for k, t in loop.model.state_dict().items()})
        loop.scheduler.observe(val_loss=torch.tensor(val))
        loop.train([step + 100])  # steps of other data, without a validation loss of their own
    assert guard.best == 1.0 and guard.tripped is None
    assert guard.load_best() == 1
    assert same(loop.model, states[1])


@pytest.mark.parametrize("how", ["far above", "not finite", "diverged"])
def test_a_run_that_leaves_its_best_behind_goes_back_to_it(how, capsys):
    loop, guard = guarded(every=1, **({"margin": 0.5} if how == "far above" else {}))
    loop.scheduler.observe(val_loss=1.0)
    best = {k: t.clone() for k, t in loop.model.state_dict().items()}
    loop.train(range(100, 110, 3))
    assert not same(loop.model, best) and loop.optimizer.param_groups[0]["lr"] != 1e-3
    if how == "diverged":
        loop.optimizer.step()
        loop.scheduler.observe(loss=float("nan"))
    else:
        for _ in range(2 if how == "far above" else 1):
            loop.optimizer.step()
            loop.scheduler.observe(loss=1.0, val_loss=1.6 if how == "far above" else float("inf"))
    loop.scheduler.step()
    assert same(loop.model, best)
    assert loop.optimizer.param_groups[0]["lr"] == 1e-3  # the base, to the end
    assert capsys.readouterr().out.count("back to the base, from the weights of step 0") == 1
    loop.train(range(120, 126))
    assert set(loop.rates[-6:]) == {1e-3}
    assert float(loop.controller._values[0]) == pytest.approx(1e-3)  # and the policy knows


def test_a_guard_of_a_model_keeps_parameters_and_buffers():
    model = nn.BatchNorm1d(2)
    guard = jel.ValidationGuard.of(model, patience=5)
    guard.start(10, ())
    guard.validated(1, 1.0)
    best = {k: t.clone() for k, t in model.state_dict().items()}
    with torch.no_grad():
        model.weight.add_(1)
        model.running_mean.sub_(1)
    guard.validated(2, 1.2)
    later = {k: t.clone() for k, t in model.state_dict().items()}
    assert not same(model, best)
    assert guard.load_best() == 1 and same(model, best) and guard.patience == 5
    told = iter((1.2, 1.3))
    assert guard.load_best(lambda: next(told)) == 1  # the mean validates as well as the second best
    for name, value in model.state_dict().items():
        mean = (best[name] + later[name]) / 2 if value.is_floating_point() else best[name]
        assert torch.equal(value, mean)
    assert guard.load_best(lambda: next(told)) == 1 and same(model, best)  # and here it does not
    with pytest.raises(StopIteration):
        next(told)


@pytest.mark.parametrize("told", ["loss", "val_loss"])
def test_a_batch_that_is_not_a_number_costs_a_window_and_not_the_run(told):
    """The momenta take it up as well: going back to the weights alone would lose them at the next step."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    guard = jel.ValidationGuard.of(model, every=1)
    scheduler = jel.Scheduler(optimizer, 60, "lhopt", guard=guard)
    x = torch.randn(60, 16, 4)
    for step in range(60):
        loss = (model(x[step] * (math.nan if step == 30 else 1.0)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.observe(loss=loss if told == "loss" else 1.0, val_loss=(model(x[0]) - 1).square().mean())
        scheduler.step()
    assert guard.tripped and loss.isfinite() and loss < 1
    assert optimizer.param_groups[0]["lr"] == 1e-3 and scheduler.multipliers["0"]["lr"] == 1.0


def test_going_back_with_the_optimizers_own_state_still_holds_the_base():
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    save = lambda: copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    guard = jel.ValidationGuard(save, lambda kept: (model.load_state_dict(kept[0]), optimizer.load_state_dict(kept[1])))
    scheduler = jel.Scheduler(optimizer, 40, "lhopt", guard=guard)
    for step in range(30):
        loss = (model(torch.randn(16, 4)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.observe(loss=loss, val_loss=math.nan if step == 20 else 1.0 / (step + 1))
        scheduler.step()
    assert guard.tripped and scheduler.multipliers["0"]["lr"] == 1.0
    assert optimizer.param_groups[0]["lr"] == 1e-3 and optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("shift", [-5.0, math.nan])
def test_a_loss_that_it_never_saw_is_said_once(shift):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = jel.Scheduler(optimizer, 40, "lhopt")
    with pytest.warns(UserWarning, match="not a number above 0") as said:
        for _ in range(40):
            optimizer.step()
            scheduler.observe(loss=shift)
            scheduler.step()
    assert len(said) == 1


def test_only_so_many_copies_are_kept_and_those_of_the_best():
    made = iter("abcdefg")
    guard, loaded = jel.ValidationGuard(lambda: next(made), print, margin=9.0, keep=3), []
    guard.snapshot(lambda: next(made), loaded.append)
    guard.start(10, ())
    for step, loss in enumerate((5.0, 4.0, 6.0, 7.0, 3.0, math.nan)):
        guard.validated(step, loss)
    assert [kept for _, _, kept in guard._kept] == ["d", "b", "a"]  # 7.0 was not copied
    assert guard.tripped and loaded == ["d"]  # what is not finite goes back at once
    guard.validated(6, 2.0)
    assert guard.load_best() == 6 and loaded[-1] == "e"  # the base's run is kept too
    with pytest.raises(JelError, match="at least 1 copy"):
        jel.ValidationGuard(lambda: 0, print, keep=0)
