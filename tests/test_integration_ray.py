"""Ray: episodes over actors change no result; a schedule as a trial of Tune. The cluster is this machine."""

from __future__ import annotations

import os

import pytest
import torch

ray = pytest.importorskip("ray")
pytest.importorskip("ray.tune")

import jel  # noqa: E402
from jel.integrations.episodes import run_episode  # noqa: E402
from jel.integrations.ray import RayTask, schedule_of, search_space, trainable  # noqa: E402
from tests.jel_parts import QuadraticTask  # noqa: E402


class Breaking(QuadraticTask):
    def train(self, first_step, steps, multipliers):
        raise jel.JelError("the loss is NaN from the start")


class Priced(QuadraticTask):
    def costs(self):
        return 0.5, 1.0  # not measured by the clock: the plan of a fit is then always the same


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    ray.init(num_cpus=2, object_store_memory=80 * 2**20, **options)
    yield
    ray.shutdown()


def losses(task, lr: torch.Tensor) -> torch.Tensor:
    task.reset(3, range(5))
    task.train(0, 10, {"*": {"lr": lr, "weight_decay": torch.ones(5)}})
    task.save(0, torch.tensor([True, False, True, False, True]))
    task.train(10, 13, {"*": {"lr": lr, "weight_decay": torch.ones(5)}})
    task.load(0, torch.tensor([True, False, False, False, True]))
    return task.observe(["probe_loss"])["probe_loss"]


def test_actors_change_no_result():
    lr, task = torch.linspace(0.1, 10.0, 5), RayTask(QuadraticTask(), workers=2)
    assert task.groups == ("x",) and task.num_steps(0) == 23
    assert torch.equal(losses(task, lr), losses(QuadraticTask(), lr))
    task.close()
    broken = RayTask(Breaking(), workers=1)
    with pytest.raises(jel.JelError, match="the loss is NaN from the start"):
        losses(broken, lr)
    broken.close()


class Placed(QuadraticTask):
    def with_steps(self, steps):
        return Placed(steps)

    def observe(self, names):
        return {"probe_loss": torch.full(self.x.shape, float(os.getpid()))}


def test_tasks_of_other_lengths_share_the_actors():
    """A cluster that is full with one task's actors would let those of the next wait for ever."""
    task = RayTask(Placed(), workers=1)
    others = [task.with_steps(5), task.with_steps(7)]
    assert [each.num_steps(0) for each in others] == [5, 7]
    for each in (task, *others):
        each.reset(0, range(2))
    processes = {float(each.observe(["probe_loss"])["probe_loss"][0]) for each in (task, *others)}
    assert len(processes) == 1 and float(os.getpid()) not in processes
    for each in (task, *others):
        each.close()


@pytest.mark.filterwarnings("error:the actors ask")
def test_actors_that_must_wait_are_announced():
    with pytest.raises(UserWarning, match="ask for 3 CPU and Ray has 2"):
        RayTask(QuadraticTask(), workers=3).reset(0, range(3))


def test_fit_learns_on_it():
    learned = [
        jel.fit(task, budget=200.0, seed=1, say=lambda line: None) for task in (Priced(), RayTask(Priced(), workers=2))
    ]
    assert learned[0].card["learned"] == learned[1].card["learned"]
    assert learned[0].schedule == learned[1].schedule


def test_a_schedule_is_a_trial_of_tune(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "0")
    config = ray.tune.TuneConfig(num_samples=2)
    run = ray.tune.RunConfig(storage_path=str(tmp_path), verbose=0)
    tuner = ray.tune.Tuner(
        trainable(QuadraticTask(), points=2), param_space=search_space(2), tune_config=config, run_config=run
    )
    best = tuner.fit().get_best_result("probe_loss", "min")
    assert best.metrics["step"] == 23
    assert run_episode(QuadraticTask(), schedule_of(best, points=2)) == pytest.approx(best.metrics["probe_loss"])


def test_bad_input_is_one_line():
    with pytest.raises(jel.JelError, match="at least one worker"):
        RayTask(QuadraticTask(), workers=0)
