"""jel.fit: better than a bad base, no harm to a good one, exact after a stop, one clear line for bad input."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import jel
from jel import JelError, Knob
from jel.fitting import Base, FitConfig
from jel.fitting.base import as_base, knobs_for
from jel.fitting.compare import candidate, judge
from jel.fitting.plan import Price, make_plan
from jel.fitting.state import load_state
from jel.learn.meta import MetaTrainer
from tests.jel_parts import QuadraticTask
from tests.loop_parts import net_task, quadratic

QUICK = FitConfig(updates=6, fewest=6, shortest=10)


def fit(task, **choices):
    lines: list[str] = []
    given = {"budget": 40.0, "base": 30.0, "config": QUICK, "say": lines.append, **choices}
    return jel.fit(task, **given), lines


# -----------------------------------------------------------------------------
# what it finds


@pytest.mark.parametrize("method", ["jel", "cma", "random"])
def test_it_finds_a_better_schedule_than_a_base_ten_times_too_low(method):
    if method == "cma":
        pytest.importorskip("cmaes")
    result, lines = fit(quadratic(0.05, noise=0.1), method=method)
    assert result.card["kept"] in ("learned", "carried")
    rates = [row["multipliers"]["*"]["lr"] * 0.05 for row in result.schedule["decisions"]]
    assert all(0.1 < rate < 2.0 for rate in rates)  # 1 is best without noise, 2 diverges
    assert sum(line.startswith("update ") for line in lines) == result.card["plan"]["updates"]
    assert any("beats the untouched base" in line for line in lines)
    losses = result.card["comparison"]["probe_loss"]
    assert all(a[-1] < b[-1] for a, b in zip(losses[result.card["kept"]], losses["base"]))


def test_the_schedule_works_in_the_loop_that_it_is_for():
    """The snippet of the README: a scheduler on the user's own optimizer."""
    task = quadratic(0.05)
    result, _ = fit(task)
    model = task.loop.make_model()
    optimizer = task.loop.make_optimizer(model)
    scheduler = jel.Scheduler(optimizer, task.steps, result.schedule)
    first = result.schedule["decisions"][0]["multipliers"]["*"]["lr"]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * first)
    for _ in range(task.steps):
        optimizer.zero_grad()
        task.loop.loss(model, torch.zeros(4)).backward()
        optimizer.step()
        scheduler.step()
    assert model.x.norm() < 0.05
    other = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(JelError):
        jel.Scheduler(other, task.steps, result.schedule)


def test_the_snippet_of_the_documents_works_as_it_stands(capsys):
    code = re.search(
        r"^```python\n(.*?)^```", (Path(__file__).parent.parent / "docs" / "fit.md").read_text(), re.S | re.M
    )[1]
    torch.manual_seed(0)
    exec(compile(code, "docs/fit.md", "exec"), names := {"__name__": "snippet"})
    assert names["scheduler"].last_epoch == 1000 and names["result"].card["verdict"] in capsys.readouterr().out


def test_no_harm_to_a_base_that_is_best():
    """One step of gradient descent at rate 1 is at the bottom: nothing is better."""
    for method in ("jel", "random"):
        result, lines = fit(quadratic(1.0), base=3.0, method=method)
        assert result.schedule == jel.schedules.constant(1.0)
        assert result.card["kept"] == "base" and "constant(1.0)" in result.card["verdict"]
        assert result.card["verdict"] in lines


def test_a_gain_that_will_not_last_is_no_gain():
    shrinking = [[[1.0, 0.5], [0.8, 0.7]]] * 3  # the base is catching up
    lasting = [[[1.0, 0.9], [0.8, 0.65]]] * 3
    assert not judge(shrinking, (50, 100), 1000).better
    assert judge(shrinking, (50, 100), 101).better
    assert judge(lasting, (50, 100), 1000).better
    assert not judge(lasting, (50, 100), 1000).gain[1] <= 0


def test_noise_and_blow_ups_are_no_gain():
    assert not judge([[[1.0, 0.5]], [[1.0, 1.4]], [[1.0, 0.9]]], (10,), 10).better
    assert judge([[[1.0, float("inf")]]] * 3, (10,), 10).chosen == 0
    found = judge([[[float("inf"), 0.5, float("inf")]]] * 3, (10,), 10)  # only the base and the last blow up
    assert found.better and found.chosen == 1
    below = judge([[[-1.0, -2.0]], [[-1.0, -2.1]], [[-1.0, -1.9]]], (10,), 10)  # no logarithm of these
    assert below.better and below.gain[0] == pytest.approx(1.0)


def test_what_is_compared():
    rows = [{"progress": 0.5, "multipliers": {"*": {"lr": 9.0, "weight_decay": 2.0}, "head": {"lr": 0.25}}}]
    knobs = (Knob("lr", "lr", bounds=(0.1, 10.0)), Knob("weight_decay", "weight_decay"), Knob("head", "lr", ("head",)))
    of = lambda way, carry=0.5: candidate(way, rows, carry, knobs)[0]
    assert of("base") == {"progress": 0.5, "multipliers": {"*": {"lr": 1.0, "weight_decay": 1.0}, "head": {"lr": 1.0}}}
    assert of("carried")["multipliers"] == {"*": {"lr": 4.5, "weight_decay": 2.0}, "head": {"lr": 0.125}}
    assert of("learned") == rows[0]
    assert of("carried", 0.001)["multipliers"] == {"*": {"lr": 0.1, "weight_decay": 2.0}, "head": {"lr": 0.001}}


def test_rates_of_short_episodes_are_carried_over_to_the_run_by_the_root_of_its_length():
    price, ways = Price(1.0, None, 1e-3, 0.0), {}
    for budget in (1.0, 4.0, 60.0):
        plan = make_plan(1000, budget, price, FitConfig(), fixed_length=False)
        assert plan.carry(0.5) == pytest.approx((plan.episode_steps / 1000) ** 0.5)
        ways[budget] = plan.ways
    assert ways == {1.0: ("base", "carried"), 4.0: ("base", "carried"), 60.0: ("base", "carried", "learned")}
    whole = make_plan(1000, 60.0, price, FitConfig(), fixed_length=True)
    assert whole.ways == ("base", "learned") and whole.carry(0.5) == 1.0


def test_any_task_of_the_protocol_will_do():
    result, _ = fit(QuadraticTask(steps=10, floor=1.0), budget=200.0, method="random")
    assert result.card["plan"]["episode_steps"] == 10 and result.card["plan"]["check_lengths"] == [10]
    assert all(len(row) == 8 for row in result.card["returns"])


# -----------------------------------------------------------------------------
# the plan and the knobs


def test_a_plan_keeps_to_its_budget():
    for run_steps in (30, 1000, 100_000):
        for budget in (2.0, 5.0, 30.0, 1000.0):
            for probe in (0.1, 3.0):
                price = Price(probe, None, 1e-3, 40.0)
                try:
                    plan = make_plan(run_steps, budget, price, FitConfig(), fixed_length=False)
                except JelError as e:
                    assert "does not pay" in str(e) and run_steps == 30
                    continue
                assert plan.runs <= budget * (1 + 1e-9)
                assert plan.episode_steps <= plan.check_lengths[-1] <= run_steps
                assert plan.updates >= 1
    assert plan.check_lengths == (100_000,)  # so large a budget pays for whole runs
    lower = make_plan(1000, 1.0, price, FitConfig(), fixed_length=False)
    assert len(lower.check_lengths) == 2 and lower.check_lengths[1] < 1000


def test_groups_become_smaller_and_then_fewer_before_episodes_become_too_short():
    price, config = Price(1.0, None, 1e-3, 0.0), FitConfig()
    plans = [make_plan(1000, budget, price, config, fixed_length=False) for budget in (0.9, 1.9, 4.0, 12.0, 18.0, 60.0)]
    assert [plan.updates for plan in plans] == sorted(plan.updates for plan in plans)
    assert [plan.group for plan in plans] == [4, 4, 8, 8, 8, 8]
    for plan in plans:
        recipe = config.recipe(plan, ())
        assert recipe.compare == (plan.updates >= 6) + (plan.updates >= 10) < plan.updates
        if plan.updates < config.fewest:
            assert plan.episode_steps == 20
    assert plans[0].updates < config.fewest and plans[-1].updates == config.updates
    assert plans[-1].episode_steps > 200


def test_the_least_budget_that_is_named_is_enough():
    for run_steps in (30, 200, 20_000):
        for probe in (0.1, 4.0):
            price = Price(probe, None, 1e-3, 8 * (4 + probe))
            with pytest.raises(JelError, match="give at least") as caught:
                make_plan(run_steps, 0.1, price, FitConfig(), fixed_length=False)
            assert make_plan(run_steps, float(str(caught.value).split()[-1]), price, FitConfig(), False).updates >= 1


def test_the_price_is_what_was_run():
    """Counted from outside: training steps and looks at the probe, in the plan's units."""
    task = QuadraticTask(steps=10, floor=0.1)
    task.costs = lambda: (0.5, None)
    counted = {"steps": 0.0, "looks": 0}
    train, observe, reset = task.train, task.observe, task.reset

    def counting_reset(group, episodes):
        task.side_by_side = len(episodes)
        reset(group, episodes)

    def counting_train(first_step, steps, multipliers):
        counted["steps"] += steps * task.side_by_side
        train(first_step, steps, multipliers)

    def counting_observe(names):
        counted["looks"] += task.side_by_side
        return observe(names)

    task.train, task.observe, task.reset = counting_train, counting_observe, counting_reset
    result, _ = fit(task, budget=100.0, config=FitConfig(updates=3, fewest=3))
    spent = (counted["steps"] + 0.5 * counted["looks"]) / 10
    assert result.card["price"]["run_equivalents"] == pytest.approx(spent)


def test_knobs_are_those_that_the_optimizer_has():
    names = lambda task, **choices: [knob.name for knob in knobs_for(task, Base(**choices), 3)]
    assert names(quadratic(0.1)) == ["lr"]  # one group, no decay
    assert names(net_task()) == ["lr", "weight_decay", "1.lr"]  # group 0 has more parameters
    assert names(net_task(), corrections=None) == ["lr", "weight_decay"]
    assert knobs_for(net_task(), as_base(5.0), 3)[0].bounds == (0.2, 5.0)
    assert as_base(None).lr == 10.0 and as_base("unknown").lr == 1000.0 and as_base({"weight_decay": 2.0}).lr == 10.0


# -----------------------------------------------------------------------------
# stopping, resuming, files


def without_time(result):
    return {key: value for key, value in result.card.items() if key != "price"}, result.schedule


@pytest.mark.parametrize(
    "method, stop, number, error",
    [
        ("jel", 3, signal.SIGINT, KeyboardInterrupt),
        ("jel", 5, signal.SIGTERM, SystemExit),  # before the group that only compares policies
        ("random", 3, signal.SIGTERM, SystemExit),
    ],
)
def test_stopped_and_resumed_is_bit_for_bit_undisturbed(tmp_path, method, stop, number, error):
    task = lambda: net_task(episodes="batched", steps=30)
    expected, _ = fit(task(), method=method)
    stop_at, heard = f"update {stop:02d}", []

    def say(line):
        heard.append(line)
        if line.startswith(stop_at):
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(error):
        fit(task(), method=method, folder=tmp_path, say=say)
    assert signal.getsignal(number) is before
    assert heard[-1].startswith(f"stopped after update {stop}") and not (tmp_path / "schedule.json").exists()
    with pytest.raises(JelError, match="holds a fit already"):
        fit(task(), method=method, folder=tmp_path)
    with pytest.raises(JelError, match="another seed"):
        fit(task(), method=method, folder=tmp_path, resume=True, seed=5)
    result, lines = fit(task(), method=method, folder=tmp_path, resume=True)
    assert any(f"resumed after update {stop}" in line for line in lines)
    assert without_time(result) == without_time(expected)
    again, lines = fit(task(), method=method, folder=tmp_path, resume=True)  # finished: nothing is run again
    assert without_time(again) == without_time(expected) and not any(line.startswith("update") for line in lines)
    assert jel.load_schedule(tmp_path / "schedule.json") == result.schedule


def test_a_stop_before_the_first_group_is_done(monkeypatch):
    """Too few updates to compare policies by episodes, and nothing yet to ask the critic about."""
    update, lines = MetaTrainer.update, []

    def stopped(trainer):
        os.kill(os.getpid(), signal.SIGINT)
        return update(trainer)

    monkeypatch.setattr(MetaTrainer, "update", stopped)
    with pytest.raises(KeyboardInterrupt):
        fit(quadratic(0.05), config=FitConfig(updates=3, fewest=3, shortest=10), say=lines.append)
    assert lines[-1].startswith("stopped after update 0 of 3")


@pytest.mark.parametrize("steps", [11, 12, 16])
def test_the_critic_chooses_at_the_decisions_of_its_episodes(steps):
    """Lengths that five decisions do not divide have fewer of them, or others than the fifths of a run."""
    few = FitConfig(updates=3, fewest=3, shortest=steps, wanted_share=1.0, compare_from=(9,))
    result, _ = fit(quadratic(0.02, steps=steps), config=few, base=100.0)
    assert result.card["kept"] != "base" and result.card["plan"]["episode_steps"] == steps
    interval = -(-steps // 5)
    progress = [row["progress"] for row in result.schedule["decisions"]]
    assert progress == pytest.approx([first / steps for first in range(0, steps, interval)])


def test_a_damaged_state_is_one_clear_line(tmp_path):
    (tmp_path / "fit.safetensors").write_bytes(b"not one")
    with pytest.raises(JelError, match="is not a jel-fit-state") as caught:
        load_state(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    result, _ = fit(quadratic(0.05), config=FitConfig(updates=2, fewest=2, shortest=10))
    result.plot(tmp_path / "fit.png")
    assert (tmp_path / "fit.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(JelError, match="cannot write the picture"):
        result.plot(tmp_path / "no" / "fit.png")


def test_nothing_of_learning_is_imported_before_it_is_called():
    code = "import jel, sys; jel.fit; print([m for m in sys.modules if m.startswith(('jel.learn', 'jel.fitting'))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# -----------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    "choices, message",
    [
        ({"method": "annealing"}, "unknown method 'annealing'"),
        ({"method": "halving"}, "use one of jel, cma, random"),
        ({"budget": 0}, "budget is 0"),
        ({"budget": "much"}, "budget is 'much'"),
        ({"budget": 0.5}, "does not pay for one group"),
        ({"base": 0.5}, "range of lr is 0.5"),
        ({"base": "fine"}, "base 'fine' is none of"),
        ({"base": {"rate": 3}}, "base has unknown rate"),
        ({"resume": True}, "needs the folder"),
        ({"folder": __file__}, "is a file; give a folder"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"config": {}}, "config is a jel.fitting.FitConfig, not dict"),
    ],
)
def test_bad_input_is_one_clear_line(choices, message):
    with pytest.raises(JelError, match=message) as caught:
        fit(quadratic(0.05), **choices)
    assert "\n" not in str(caught.value)


def test_what_is_no_task():
    with pytest.raises(JelError, match="is no task"):
        fit(object())
