"""Settings of the search in jel.fit, compared by what they find for episodes of one length.

    python -m examples.fit_settings --steps 50

A figure is the probe loss of an episode under what was found, as a multiple of that under the best of 9 constants:
fresh seeds, geometric mean over the problems and rates of examples/fit_small.py and two seeds each.
"""

from __future__ import annotations

import argparse
import itertools
import statistics

from examples.fit_small import RATES, make_task
from jel.fitting.base import as_base, knobs_for
from jel.fitting.compare import FRESH, run_side_by_side
from jel.fitting.plan import FitRecipe
from jel.fitting.sparse import EndsOnly
from jel.learn.exploration import Exploration
from jel.policy import multiplier_table
from jel.tasks.loop import LoopTask

CONSTANTS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)  # learning rates
PAPER = {"learner": "grpo", "returns": "total", "policy_lr_schedule": "linear", "policy_lr": 0.012}
SHORT = {"updates": 2, "compare": 0}
# name -> (method, choices that differ from: 10 groups of 8, two of which compare)
SETTINGS: dict[str, tuple[str, dict]] = {
    "10 groups of 8": ("jel", {}),
    "the same, nothing compared": ("jel", {"compare": 0}),
    "the same, a policy gradient": ("jel", {"compare": 0, **PAPER}),
    "cma": ("cma", {}),
    "random": ("random", {}),
    "20 groups of 4": ("jel", {"updates": 20, "episodes": 4}),
    "2 groups of 8": ("jel", SHORT),
    "4 groups of 4": ("jel", {**SHORT, "updates": 4, "episodes": 4}),
    "4 groups of 4, a policy gradient": ("jel", {**SHORT, **PAPER, "updates": 4, "episodes": 4}),
    "4 groups of 4, cma": ("cma", {**SHORT, "updates": 4, "episodes": 4}),
    "4 groups of 4, random": ("random", {**SHORT, "updates": 4, "episodes": 4}),
}


def losses(task: LoopTask, ways: list[list[dict]]) -> list[float]:
    found = [run_side_by_side(task, FRESH + i, ways) for i in range(4)]
    return [statistics.mean(column) for column in zip(*(row for row in found if row is not None))]


def found_by(method: str, choices: dict, task: LoopTask, base: str, seed: int) -> list[dict]:
    """Rows of the schedule that this setting finds."""
    ours = {"learner": "critic", "policy_lr": 1e-2, "exploration": Exploration(0.98, True)}
    given = {"episodes": 8, "updates": 10, "compare": 2, **ours, **choices}
    recipe = FitRecipe(turned=knobs_for(task, as_base(base), 3), decision_interval=-(-task.num_steps(0) // 5), **given)
    if method == "jel":
        trainer = recipe.trainer(EndsOnly(task), seed, seed + 1, seed + 2, recipe.episodes)
    else:
        trainer = recipe.searcher(method, EndsOnly(task), seed, recipe.episodes)
    for _ in range(recipe.updates):
        trainer.update()
    return multiplier_table(trainer.policy, [k / 5 for k in range(5)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    args = parser.parse_args()
    cells = list(itertools.product(("digits", "tabular"), RATES))
    tasks = {cell: make_task(cell[0], RATES[cell[1]], args.steps, 0) for cell in cells}
    best = {}
    for cell, task in tasks.items():
        constants = [[{"progress": 0.0, "multipliers": {"*": {"lr": c / RATES[cell[1]]}}}] for c in CONSTANTS]
        best[cell] = min(losses(task, constants))
    for name in args.settings:
        method, choices = SETTINGS[name]
        ratios = []
        for cell, seed in itertools.product(cells, range(2)):
            rows = found_by(method, choices, tasks[cell], "good" if cell[1] == "1e-3" else "unknown", seed)
            ratios.append(losses(tasks[cell], [rows])[0] / best[cell])
        print(
            f"| {name} | {statistics.geometric_mean(ratios):.3f} | {min(ratios):.2f} to {max(ratios):.2f} |", flush=True
        )


if __name__ == "__main__":
    main()
