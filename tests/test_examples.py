"""Each example runs, briefly; all-ones multipliers change not a bit of it in its framework; it can be learned on."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

import jel
from examples import compare

NEEDS = {
    "char_transformer": (),
    "digits_cnn": ("sklearn",),
    "tabular_mlp": ("sklearn",),
    "hf_trainer": ("transformers", "accelerate"),
    "lightning_module": ("lightning", "sklearn"),
}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=NEEDS)
def example(request, monkeypatch):
    for package in NEEDS[request.param]:
        pytest.importorskip(package)
    module = importlib.import_module(f"examples.{request.param}")
    length, short = ("EPOCHS", 1) if hasattr(module, "EPOCHS") else ("STEPS", 8)
    monkeypatch.setattr(module, length, short)
    return module


def test_ones_change_nothing(example):
    under = lambda m: lambda o, steps: jel.Scheduler(o, steps, jel.schedules.constant(m))
    without = example.run(example.make_optimizer, lambda o, steps: LambdaLR(o, lambda step: 1.0), seed=1)
    ones, twos = (example.run(example.make_optimizer, under(m), seed=1) for m in (1.0, 2.0))
    assert without == ones != twos


def test_an_episode_can_be_trained(example):
    task = example.make_task(seed=1)
    task.workers = 1
    task.reset(0, range(2))
    before = task.observe(["probe_loss"])["probe_loss"]
    task.train(0, 4, {"*": {"lr": torch.tensor([1.0, 3.0])}})
    after = task.observe(["probe_loss"])["probe_loss"]
    task.close()
    assert before[0] == before[1] and after.isfinite().all() and after[0] != after[1]


def test_the_splits_share_nothing():
    from examples import char_transformer

    train, probe, test = (torch.cat(tuple(part)) for part in char_transformer.data(0))
    assert len(train) > 1000 and len(probe) == len(test) == 256


def test_the_table_says_who_wins():
    def results(method: str, losses: list[float], price: float = 0.0) -> dict:
        return {f"tabular_mlp/{method}/{i}": {"test_loss": x, "price": price} for i, x in enumerate(losses)}

    of = compare._of
    found = {**results("default", [1.0, 1.1, 1.2, 1.1, 1.1]), **results("jel", [0.5, 0.61, 0.7, 0.6, 0.6], 8.0)}
    found |= {**results("cosine", [0.4, 0.7, 0.6, 0.6, 0.6]), **results("jel rough", [2.0, 2.1, 2.2, 2.1, 2.1])}
    assert of(found, "tabular_mlp", "cosine").keys() == {0, 1, 2, 3, 4}
    table = compare.tables(found, ["tabular_mlp"]).splitlines()
    assert "| jel | 0.602 ± 0.071 (8.0 runs) |" in table
    ours, rough = table.index("| jel minus | tabular_mlp |"), table.index("| jel rough minus | tabular_mlp |")
    assert "| default | -0.498 (-0.504, -0.492) better |" in table[ours:rough]
    assert any(line.startswith("| cosine") and line.endswith("not shown |") for line in table[ours:rough])
    assert "| default | +1.000 (+1.000, +1.000) **worse** |" in table[rough:]


# -----------------------------------------------------------------------------
# the integrations' own examples


def test_accelerate_goes_on_where_it_stopped(monkeypatch, tmp_path):
    pytest.importorskip("accelerate")
    from examples import accelerate_loop as example

    monkeypatch.setattr(example, "STEPS", 8)
    threefold = jel.schedules.piecewise([(0.0, 1.0), (0.5, 3.0)])
    whole = example.run(threefold, tmp_path / "nothing", stop_at=8)
    example.run(threefold, tmp_path / "state", stop_at=5)
    assert example.run(threefold, tmp_path / "state", stop_at=8) == whole
    assert example.run(jel.schedules.constant(1.0), tmp_path / "nothing", stop_at=8) != whole


def test_optuna_finds_a_better_rate_in_short_episodes(monkeypatch, capsys):
    pytest.importorskip("optuna")
    from examples import optuna_schedule as example

    monkeypatch.setattr(example, "STEPS", 60)
    monkeypatch.setattr(example, "EPISODE", 20)
    example.main(trials=6)
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 3 and losses[1] < losses[0]


@pytest.mark.slow  # Ray takes its time to start
def test_ray_trains_the_episodes(monkeypatch, capsys):
    pytest.importorskip("ray.tune")
    from examples import ray_cluster as example

    monkeypatch.setattr(example, "STEPS", 100)
    monkeypatch.setattr(example, "EPISODE", 20)
    example.main(trials=2)
    printed = capsys.readouterr().out
    assert "with JEL: test loss" in printed and "the best of 2 trials of Tune: test loss" in printed


SHORT = [*NEEDS, "accelerate_loop", "optuna_schedule", "ray_cluster", "lhopt", "lhopt_text", "lhopt_images"]


@pytest.mark.parametrize("name", SHORT)
def test_examples_are_short(name):
    assert len((Path(compare.__file__).parent / f"{name}.py").read_text().splitlines()) < 80
    assert name in compare.EXAMPLES or name not in NEEDS
