"""LHOPT policies and their rivals on kinds that no policy was trained on: a row of losses per method and task.

    python -m scripts.lhopt.evaluate                                            rivals, and the shipped policy
    python -m scripts.lhopt.evaluate --policies lhopt/tiny-s42 lhopt/tiny-s43   policies of runs/
    python -m scripts.lhopt.evaluate --kinds tabular --task-seeds 100           on kinds that were trained on

Each row is written to $NANOCHAT_BASE_DIR/lhopt/results/ as soon as it is known and not computed again; then the tables
are printed. 8 seeds a task; score 0 is AdamW's default, 1 the best of 42 AdamW runs with hindsight.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from jel.errors import JelError
from jel.files import json_bytes, read_json, write_files
from jel.learn.control import run
from jel.policy_lstm import default_lhopt_path, load_lhopt_policy, policy_files
from jel.tasks.small.bank import DEFAULT, SEEDS, SETTINGS, BankTask, fixed_scores, load_bank, worth_learning
from jel.tasks.small.episodes import DEFAULTS
from jel.tasks.small.kinds import HELD_OUT, TRAINING
from jel.validation_guard import KEEP, RETREATS
from nanochat.common import UserError, base_dir, print0, run_main
from scripts.lhopt.rivals import GRID_PRICE, RIVALS, fixed, starts_of
from scripts.lhopt.tables import print_tables
from scripts.lhopt.train import TASKS_PER_KIND, bank_folder
from scripts.runs import run_folder

HELD_OUT_SEEDS = (0, 1)  # the tasks of each held-out kind that stand in the tables
STARTS = ("default", "random")


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--policies", nargs="*", default=[], help="tags under runs/, or paths; none: the shipped one")
    flag("--kinds", nargs="+", choices=[*TRAINING, *HELD_OUT], default=list(HELD_OUT))
    flag("--task-seeds", nargs="+", type=int, default=list(HELD_OUT_SEEDS))
    flag("--no-rivals", action="store_true")
    flag("--mode", choices=["mean", "greedy", "sample"], default="mean", help="how a policy acts")
    flag("--min-gap", type=float, default=0.0, help="leave out tasks whose gap is fewer standard errors than this")
    return parser


class Results:
    """Rows in one folder: a file per method and task, with the task's spec, so that nothing stale is read."""

    def __init__(self, folder: Path):
        self.folder = folder

    def row(self, method: str, task: BankTask, compute: Callable[[], Tensor]) -> Tensor:
        """The losses (R,) of a method on a task: read, or computed and written. Infinite where a run blew up."""
        asked = {"method": method, "task": task.spec, "seeds": list(SEEDS)}
        name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:20]
        path = self.folder / f"{name}.json"
        if not path.exists():
            losses = [x if math.isfinite(x) else None for x in compute().tolist()]
            write_files({path: json_bytes({**asked, "losses": losses})})
        return torch.tensor([math.inf if x is None else x for x in read_json(path, "result")["losses"]])


def policy_path(name: str) -> Path:
    """A tag under runs/, or a path."""
    tagged = run_folder(name) / "policy.safetensors" if not Path(name).is_absolute() else Path(name)
    if not policy_files(tagged)[0].exists():
        raise UserError(f"there is no policy at {policy_files(tagged)[0]}; train it first")
    return tagged


def controlled(
    path: Path, mode: str, starts: str, keep: int = KEEP, hide_val: bool = False, retreats: int = RETREATS
) -> tuple[str, Callable[[BankTask], Tensor]]:
    """Name (which holds the policy's hash) and function of a policy under control: task -> test losses (R,).

    `keep`: a run ends with the mean of so many of its best weights on validation, and goes back to them at most
    `retreats` times. `hide_val`: the policy is not shown the validation loss.
    """
    policy, card = load_lhopt_policy(path)
    decisions = int(card["decisions"])

    def compute(task: BankTask) -> Tensor:
        e = len(SEEDS)
        at = torch.tensor(DEFAULTS).repeat(e, 1) if starts == "default" else starts_of(task, SEEDS)
        generator = torch.Generator().manual_seed(5) if mode == "sample" else None
        how = {"generator": generator, "greedy": mode == "greedy", "hide_val": hide_val, "keep": keep}
        return run(policy, task, SEEDS, at, decisions, retreats=retreats, **how).final  # type: ignore[arg-type]

    ends = (f", mean of {keep}, {retreats} retreats" if keep else "") + (", no validation" if hide_val else "")
    return f"LHOPT {card['sha256'][:12]} {mode} {starts}{ends}", compute


def rows_of(
    results: Results,
    tasks: Sequence[BankTask],
    label: str,
    key: str,
    compute: Callable[[BankTask], Tensor],
    price: float,
) -> dict:
    """A line of the tables: losses and scores of one method on every task."""
    losses = [results.row(key, task, lambda task=task: compute(task)) for task in tasks]
    print0(f"{label}: {torch.stack([t.paired_score(x).mean() for t, x in zip(tasks, losses)]).mean():.3f}")
    return {"method": label, "price": price, "losses": losses}


def best_fixed_setting() -> tuple:
    """The one AdamW setting that does best on the training tasks: a rival that costs nothing on a new task."""
    tasks = worth_learning(load_bank(TRAINING, range(TASKS_PER_KIND), bank_folder()))
    return SETTINGS[int(fixed_scores(tasks).argmax())]


def main(argv: list[str] | None = None) -> int:
    args = flags().parse_args(argv)
    torch.set_num_threads(1)
    results = Results(base_dir() / "lhopt" / "results")
    tasks = [t for kind in args.kinds for t in load_bank([kind], args.task_seeds, bank_folder())]
    tasks = [t for t in tasks if t.gap_in_standard_errors >= args.min_gap]
    lines = [
        {
            "method": "oracle: best of 42 AdamW runs",
            "price": GRID_PRICE,
            "losses": [t.losses[t.best_setting] for t in tasks],
        },
        {"method": "AdamW default, no control", "price": 1, "losses": [t.losses[DEFAULT] for t in tasks]},
    ]
    if not args.no_rivals:
        setting = best_fixed_setting()
        label = f"AdamW {setting[0]:g} {setting[1]}, decay {setting[2]:g}: best on the training tasks"
        lines.append(rows_of(results, tasks, label, f"fixed {setting}", lambda t: fixed(setting)(t, SEEDS), 1))
        key = f"fixed {setting}, mean of {KEEP}, {RETREATS} retreats"
        compute = lambda t: fixed(setting, guard=True)(t, SEEDS)
        lines.append(rows_of(results, tasks, "the same, with the guard", key, compute, 1))
        for name, (function, price) in RIVALS.items():
            lines.append(rows_of(results, tasks, name, name, lambda t, f=function: f(t, SEEDS), price))
    paths = [policy_path(name) for name in args.policies] or [default_lhopt_path()]
    for path, name in zip(paths, args.policies or ["shipped"]):
        for starts, hide_val in itertools.product(STARTS, (False, True)):
            key, compute = controlled(path, args.mode, starts, 0 if hide_val else KEEP, hide_val)
            label = f"LHOPT {name}, {starts} start" + ", no validation loss" * hide_val
            lines.append(rows_of(results, tasks, label, key, compute, 1))
    print_tables(tasks, lines)
    return 0


if __name__ == "__main__":
    run_main(main, JelError)
