"""jel.fit on two small problems whose data come with scikit-learn, beside the untouched base and searches.

pip install scikit-learn
python -m examples.fit_small                     the table of docs/fit.md, some minutes on a core
python -m examples.fit_small --budgets 4 --seeds 1 --problems digits
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

import jel
from jel.tasks.loop import LoopTask

RATES = {"1e-3": 1e-3, "1e-5": 1e-5}
# Student's t, two-sided at 95%, by number of seeds; for more, that of 10
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def data(problem: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Standardised inputs (N, D) and class labels (N,), shuffled once and for all."""
    from sklearn import datasets

    loaded = {"digits": datasets.load_digits, "tabular": datasets.load_breast_cancer}[problem]()
    x, y = torch.tensor(loaded.data, dtype=torch.float32), torch.tensor(loaded.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    return x[order], y[order]


def make_model(inputs: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes))


def make_optimizer(rate: float, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate)


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def shuffled(x: torch.Tensor, y: torch.Tensor, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for rows in torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).split(32):
        yield x[rows], y[rows]


def make_task(problem: str, rate: float, steps: int, seed: int, held_out: str = "probe") -> LoopTask:
    """60% of the rows train, 20% are the probe, 20% are the test that no fit sees."""
    x, y = data(problem)
    a, b = int(0.6 * len(x)), int(0.8 * len(x))
    rows = slice(a, b) if held_out == "probe" else slice(b, None)
    return LoopTask(
        partial(make_model, x.shape[1], int(y.max()) + 1),
        partial(make_optimizer, rate),
        partial(shuffled, x[:a], y[:a]),
        loss,
        [(x[rows], y[rows])],
        steps=steps,
        seed=seed,
        name=f"{problem} at {rate:g}",
    )


def test_loss(problem: str, rate: float, steps: int, seed: int, schedules: list[dict]) -> list[float]:
    """The test loss at the end of a real run under each schedule, all from one initialisation and order of data."""
    task = make_task(problem, rate, steps, 10_000 + seed, "test")
    controllers = [jel.ScheduleController(schedule) for schedule in schedules]
    task.reset(0, range(len(schedules)))
    points = sorted({row["progress"] for schedule in schedules for row in schedule["decisions"]})
    firsts = [math.ceil(point * steps) for point in points] + [steps]
    for point, first, after in zip(points, firsts, firsts[1:]):
        chosen = [controller.decide({"progress": point})["*"] for controller in controllers]
        keys = {key for own in chosen for key in own}
        held = {key: torch.tensor([float(own.get(key, 1.0)) for own in chosen]) for key in keys}
        task.train(first, after - first, {"*": held})
    return task.observe(["probe_loss"])["probe_loss"].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=["digits", "tabular"])
    parser.add_argument("--rates", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--budgets", nargs="+", type=float, default=[1.0, 4.0, 16.0])
    parser.add_argument("--methods", nargs="+", default=["jel", "cma", "random"])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    print("| problem | base lr | budget, runs | method | test loss, mean ± std | minus the base, 95% | kept base |")
    print("|---|---|---|---|---|---|---|")
    for budget, problem, rate in itertools.product(args.budgets, args.problems, args.rates):
        table(problem, rate, budget, args)


def table(problem: str, rate: str, budget: float, args: argparse.Namespace) -> None:
    base = "good" if rate == "1e-3" else "unknown"
    found: dict[str, list[float]] = {"base": []} | {method: [] for method in args.methods}
    kept = dict.fromkeys(args.methods, 0)
    t0 = time.time()
    for seed in range(args.seeds):
        schedules = [jel.schedules.constant(1.0)]
        for method in args.methods:
            task = make_task(problem, RATES[rate], args.steps, seed)
            result = jel.fit(task, budget=budget, base=base, method=method, seed=seed, say=lambda line: None)
            schedules.append(result.schedule)
            kept[method] += result.card["kept"] == "base"
        for name, value in zip(found, test_loss(problem, RATES[rate], args.steps, seed, schedules)):
            found[name].append(value)
    for name, values in found.items():
        gaps = [v - b for v, b in zip(values, found["base"])]
        spread = "" if name == "base" else f"{statistics.mean(gaps):+.4f}{half_interval(gaps)}"
        count = "" if name == "base" else f"{kept[name]} of {args.seeds}"
        mean = f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")
        print(f"| {problem} | {rate} | {budget:g} | {name} | {mean} | {spread} | {count} |")
    print(f"<!-- {time.time() - t0:.0f} s -->", flush=True)


def half_interval(gaps: list[float]) -> str:
    """Of the mean, at 95%; nothing for a single seed."""
    n = len(gaps)
    return f" ± {T95.get(n, T95[max(T95)]) * statistics.stdev(gaps) / n**0.5:.4f}" if n > 1 else ""


if __name__ == "__main__":
    main()
