"""What each part of LHOPT is worth: train again with one thing changed, all at one number of updates, and score alike.

    python -m scripts.lhopt.ablate                                    every row, one seed
    python -m scripts.lhopt.ablate --seeds 42 43 --names full no-cdf  some rows, two seeds
    python -m scripts.lhopt.ablate --list                             the rows

A row's policies lie in runs/lhopt/ablate/, its scores in $NANOCHAT_BASE_DIR/lhopt/results/; finished parts are not
repeated. Scored on fresh tasks of the kinds trained on, which is what a choice may look at, and on the held-out kinds,
which it may not. A difference is paired by task, the interval resamples tasks and seeds.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jel.errors import JelError
from jel.policy_lstm import load_lhopt_policy, save_lhopt_policy
from jel.tasks.small.bank import BankTask, load_bank, worth_learning
from jel.tasks.small.kinds import HELD_OUT, TRAINING
from jel.validation_guard import KEEP, RETREATS
from nanochat.checkpoint import load_checkpoint
from nanochat.common import UserError, base_dir, print0, run_main
from scripts.ablate.__main__ import run
from scripts.lhopt.evaluate import STARTS, Results, controlled
from scripts.lhopt.ship import CHOICE_SEEDS
from scripts.lhopt.tables import bootstrap_interval
from scripts.lhopt.train import bank_folder
from scripts.runs import run_folder


@dataclass(frozen=True)
class Row:
    """What is changed: flags of `scripts.lhopt.train`.

    `keep`: of how many of its best weights on validation a run that scores it ends with the mean; 0: no guard.
    `retreats`: how often such a run may go back to its best weights.
    `last`: whether its last actor is scored, not the averaged one. A row without flags scores the recipe's policies.
    """

    what: str
    flags: tuple[str, ...] = ()
    keep: int = KEEP
    retreats: int = RETREATS
    last: bool = False


ROWS = {
    "full": Row("the recipe"),
    # parts of the paper, left out
    "no-cdf": Row("no historical CDFs", ("--no-cdf",)),
    "no-recurrence": Row("a layer in the place of the LSTM", ("--no-recurrence",)),
    "no-privileged": Row("the value function sees what the policy sees", ("--no-privileged",)),
    "no-critic": Row("no value function: the group's mean return", ("--no-critic",)),
    "no-average": Row("the recipe's last actor instead of the averaged one", last=True),
    "no-entropy": Row("no entropy bonus", ("--entropy-coef", "0")),
    "lr-only": Row("one knob: the rate", ("--knobs", "lr")),
    "fixed-starts": Row("every training episode starts from the defaults", ("--fixed-starts",)),
    "few-kinds": Row(
        "no tasks that overfit or want small rates",
        ("--without-kinds", "tabular", "finetune", "overfit", "rescaled"),
    ),
    # parts of the paper that the recipe leaves out, put in
    "paper-steps": Row("the paper's seven steps of the rate", ("--paper-steps",)),
    "speedup": Row("reward: log speed-up over the averaged actor", ("--reward", "speedup")),
    "registers": Row("three checkpoint registers, no guard", ("--registers", "3", "--keep", "0"), keep=0),
    # ours
    "no-guard": Row("trained and scored without the guard", ("--keep", "0"), keep=0),
    "no-retreat": Row("trained and scored with a guard that does not go back", ("--retreats", "0"), retreats=0),
    "best-weights": Row("scored with a run's best weights, not the mean of five", keep=1),
    "keep-5": Row("trained on runs that end with the mean of five, too", ("--keep", "5")),
}


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--names", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME")
    flag("--list", action="store_true", help="print the rows, and run nothing")
    flag("--seeds", type=int, nargs="+", default=[42])
    flag("--updates", type=int, default=40, help="a multiple of 20")
    return parser


def train(name: str, updates: int, seed: int) -> Path:
    """The path of the row's policy of this seed, which is there when this returns."""
    tag = f"lhopt/ablate/{name if ROWS[name].flags else 'full'}-u{updates}-s{seed}"
    if not (run_folder(tag) / "result.json").exists():
        command = ["scripts.lhopt.train", "--updates", str(updates), "--seed", str(seed), *ROWS[name].flags]
        if not run([*command, "--model-tag", tag], run_folder(tag)):
            raise UserError("stopped; run the same command again to go on")
    averaged = run_folder(tag) / "policy"
    return last_actor(averaged) if ROWS[name].last else averaged


def last_actor(averaged: Path) -> Path:
    """The actor of the newest checkpoint, saved beside the averaged one."""
    policy, card = load_lhopt_policy(averaged)
    found = load_checkpoint(averaged.parent / "checkpoints")
    if found is None or found[0] != card["training"]["updates_done"]:
        raise UserError(f"{averaged.parent} has no checkpoint of its last update; give --updates a multiple of 20")
    policy.load_state_dict(found[1]["ppo"]["policy"])
    save_lhopt_policy(policy, path := averaged.parent / "last", card["training"], decisions=card["decisions"])
    return path


def scores(results: Results, path: Path, row: Row, tasks: list[BankTask]) -> Tensor:
    """Scores (2 N, R) from both kinds of start."""
    rows = []
    for starts in STARTS:
        key, compute = controlled(path, "mean", starts, row.keep, retreats=row.retreats)
        rows += [t.paired_score(results.row(key, t, lambda t=t, c=compute: c(t))) for t in tasks]
    return torch.stack(rows)


def cell(x: Tensor, full: Tensor | None) -> tuple[str, str]:
    """Mean score (of (S, 2 N, R)), and the paired difference from the full recipe with its interval."""
    if full is None or x.shape != full.shape:
        return f"{x.mean():.2f}", ""
    low, high = bootstrap_interval((x - full).transpose(0, 1).flatten(1))
    return f"{x.mean():.2f}", f"{(x - full).mean():+.2f} ({low:+.2f}, {high:+.2f})"


def main(argv: list[str] | None = None) -> int:
    args = flags().parse_args(argv)
    if args.list:
        print0(*(f"{name:<16}{row.what}" for name, row in ROWS.items()), sep="\n")
        return 0
    torch.set_num_threads(1)
    results = Results(base_dir() / "lhopt" / "results")
    fresh = worth_learning(load_bank(TRAINING, CHOICE_SEEDS, bank_folder()))
    held_out = load_bank(HELD_OUT, (0, 1), bank_folder())
    print0(f"{args.updates} updates a policy, seeds {args.seeds}; {len(fresh)} fresh tasks, {len(held_out)} held out")
    lines = ["| | fresh tasks | minus the recipe | held-out kinds | minus the recipe |", "|---|---|---|---|---|"]
    full: list[Tensor | None] = [None, None]
    for name in args.names:
        paths = [train(name, args.updates, seed) for seed in args.seeds]
        found = [
            torch.stack([scores(results, path, ROWS[name], tasks) for path in paths]) for tasks in (fresh, held_out)
        ]
        cells = [text for x, against in zip(found, full) for text in cell(x, against)]
        if name == "full":
            full = list(found)
        lines.append("| " + " | ".join([ROWS[name].what, *cells]) + " |")
        print0(lines[-1])
    print0("\n" + "\n".join(lines))
    return 0


if __name__ == "__main__":
    run_main(main, JelError)
