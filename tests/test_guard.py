"""The guard: the base's curve, recorded or extrapolated, and the ways back."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch

import jel
from jel.power_law import fit_power_law
from tests.loops import make_model, sgd

T = 400


def curve(step: float) -> float:
    return 1.0 + 3.0 * max(step, 1) ** -0.5


def run(losses, guard, schedule=None, optimizer=None, scheduler=None) -> list[float]:
    """The rate of every step, when the loop reports these losses."""
    optimizer = optimizer or sgd(make_model())
    scheduler = scheduler or jel.Scheduler(optimizer, T, schedule or jel.schedules.constant(2.0), guard=guard)
    rates = []
    for loss in losses:
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.observe(loss=loss)
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("law", [(1.0, 3.0, 0.5), (0.0, 8.0, 0.1), (2.5, 0.7, 1.3)])
def test_a_power_law_is_found_from_its_first_tenth(law):
    floor, scale, exponent = law
    steps = np.arange(10, 101, 10)
    fit = fit_power_law(steps, floor + scale * steps**-exponent)
    assert fit.at(1000) == pytest.approx(floor + scale * 1000**-exponent, rel=0.02)


def test_a_fit_has_no_smaller_error_nearby():
    """Slow twin: no point of a grid around it is better."""
    rng = np.random.default_rng(0)
    steps = np.arange(1.0, 60.0)
    losses = 1 + 3 * steps**-0.4 + 0.1 * rng.standard_normal(len(steps))
    fit = fit_power_law(steps, losses)
    error = lambda f, s, e: float(((f + s * steps**-e - losses) ** 2).sum())
    best = error(fit.floor, fit.scale, fit.exponent)
    for f in (-0.05, 0.0, 0.05):
        for s in (-0.05, 0.0, 0.05):
            assert best <= error(fit.floor + f, fit.scale + s, fit.exponent) + 1e-12
    assert best <= 1.05 * min(
        error(f, s, e) for f in np.linspace(0, 2, 21) for s in np.linspace(1, 4, 31) for e in (0.2, 0.4, 0.8)
    )


def test_what_is_no_curve():
    for steps, losses in (([1, 2], [1, 1]), ([0, 1, 2], [1, 1, 1]), ([1, 2, 3], [1, math.nan, 1])):
        with pytest.raises(ValueError, match="at least 3"):
            fit_power_law(steps, losses)
    assert fit_power_law([1, 2, 3], [1.0, 2.0, 3.0]).at(100) == 2.0  # one that rises: its mean


def test_a_run_as_good_as_the_base_goes_on(capsys):
    rng = np.random.default_rng(0)
    losses = [curve(step) + 0.05 * rng.standard_normal() for step in range(T)]
    measured = run(losses, True)
    assert measured[:40] == [0.05] * 40 and measured[40:] == [0.1] * (T - 40)  # a tenth is the base's
    recorded = run(losses, jel.Guard(curve=[(step, curve(step)) for step in range(0, T, 10)]))
    assert recorded == [0.1] * T
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("known", ["measured", "given", "of the schedule"])
def test_a_worse_run_goes_back_to_the_base_in_one_line(known, capsys):
    schedule, points = jel.schedules.constant(2.0), [(step, curve(step)) for step in range(0, T, 20)]
    guard = jel.Guard(margin=0.2, curve=points if known == "given" else None)
    if known == "of the schedule":
        schedule["base_curve"] = [[step / T, loss] for step, loss in points]
    losses = [curve(step) * (1.0 if step < 200 else 1.5) for step in range(T)]
    rates = run(losses, guard, schedule)
    back = rates.index(0.05, 100)
    assert 200 < back < 260 and rates[back:] == [0.05] * (T - back) and rates[150] == 0.1
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.rstrip() == guard.tripped
    assert f"step {back}: loss" in out and "margin 20%): back to the base" in out
    assert ("extrapolated" if known == "measured" else "recorded") in out


def test_a_single_bad_comparison_is_noise():
    """Comparisons are every 5 steps, and with smooth=0 each sees one loss: one of them sees this one."""
    losses = [curve(step) * (3.0 if step == 204 else 1.0) for step in range(T)]
    assert 0.05 not in run(losses, jel.Guard(smooth=0.0))[40:]
    assert 0.05 in run(losses, jel.Guard(smooth=0.0, patience=1))[40:]


def test_a_divergence_goes_back_to_the_snapshot(capsys):
    """Weights, optimizer state and the base's rate, at the first comparison after the loss was lost."""
    model = make_model()
    optimizer = sgd(model)
    parts = (model, optimizer)
    save = lambda: copy.deepcopy([part.state_dict() for part in parts])
    load = lambda saved: [part.load_state_dict(state) for part, state in zip(parts, saved)]
    guard = jel.Guard(curve=[(1, curve(1)), (T, curve(T))], every=10, save_every=50).snapshot(save, load)
    scheduler = jel.Scheduler(optimizer, T, jel.schedules.constant(2.0), guard=guard)
    weights = {}
    for step in range(125):
        weights[step] = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            model[0].weight += 0.01 if step < 120 else math.nan
        scheduler.observe(loss=torch.tensor(1.0 if step < 120 else math.nan))
        optimizer.step()
        scheduler.step()
    assert guard.tripped is None
    scheduler.observe(loss=math.nan)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    assert "back to the base, from the snapshot of step 100" in capsys.readouterr().out
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights[100]))
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05]


def test_a_controller_may_ask_to_go_back():
    class Returning(jel.Controller):
        def decide(self, observation):
            return jel.Decision({"*": {"lr": 0.5}}, go_back=20 if observation["progress"] > 0.5 else None)

    loaded = []
    guard = jel.Guard(curve=[(0, 2.0)], every=10, save_every=10).snapshot(lambda: len(loaded), loaded.append)
    optimizer = sgd(make_model())
    scheduler = jel.Scheduler(optimizer, 60, Returning(), interval=40, guard=guard)
    run([1.0] * 40, guard, None, optimizer, scheduler)
    assert loaded == [0]
    with pytest.raises(jel.JelError, match="there is no snapshot"):
        jel.Guard().go_back(3)


def test_a_guard_resumes():
    losses = [curve(step) * (1.0 if step < 200 else 1.5) for step in range(T)]
    whole = run(losses, True)
    assert 0.05 in whole[200:]
    for at in (20, 150, 215, 300):
        one, two = sgd(make_model()), sgd(make_model())
        first, second = (jel.Scheduler(o, T, jel.schedules.constant(2.0), guard=True) for o in (one, two))
        begun = run(losses[:at], None, None, one, first)
        torch.save(first.state_dict(), file := io.BytesIO())
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        assert begun + run(losses[at:], None, None, two, second) == whole


def test_bad_guards():
    for options in ({"margin": 0}, {"measure": 1.0}, {"smooth": 1.0}, {"every": 0}, {"patience": 0}, {"save_every": 0}):
        with pytest.raises(jel.JelError, match="a guard needs"):
            jel.Guard(**options)
    optimizer = sgd(make_model())
    scheduler = jel.Scheduler(optimizer, T, jel.schedules.constant(2.0), guard=True)
    with pytest.raises(jel.JelError, match="was not told a loss"):
        for _ in range(11):
            optimizer.step()
            scheduler.step()
    assert scheduler.last_epoch == 4  # comparisons are 5 steps apart


LAWS = [(1.0, 3.0, 0.5), (0.0, 8.0, 0.1), (2.5, 0.7, 1.3), (0.1, 2.0, 0.7)]


@pytest.mark.slow
def test_what_an_extrapolating_guard_catches(capsys):
    """The table of docs/scheduler.md: noise of 2, 10 and 30%, 20 seeds, a run 1.5 times worse from its middle on."""

    def trips(steps, law, noise, worse, seed):
        rng, guard = np.random.default_rng(seed), jel.Guard()
        guard.start(steps, [])
        for step in range(1, steps + 1):
            loss = (law[0] + law[1] * step ** -law[2]) * (1 + noise * rng.standard_normal())
            guard.observe(step, loss * (worse if step > steps / 2 else 1))
            guard.judge(step)
            if guard.tripped:
                return step
        return 0

    rows = []
    for steps in (100, 400, 3000):
        cases = [(steps, law, noise) for law in LAWS for noise in (0.02, 0.1, 0.3)]
        false = sum(trips(*case, 1.0, seed) > 0 for case in cases for seed in range(20))
        caught = sum(trips(*case, 1.5, seed) > steps / 2 for case in cases for seed in range(20))
        rows.append((steps, false, caught, 20 * len(cases)))
    capsys.readouterr()
    with capsys.disabled():
        for steps, false, caught, n in rows:
            print(f"\n| {steps} | {false} of {n} | {caught} of {n} |", end="")
    assert rows[2][1] <= 5 and rows[2][2] >= 0.95 * rows[2][3]  # of runs long enough to measure
