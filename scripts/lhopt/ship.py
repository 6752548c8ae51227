"""Choose one of several policies, and put it with its card where the package looks for it.

    python -m scripts.lhopt.ship --policies lhopt/tiny-s42 lhopt/tiny-s43 --out jel/policies/lhopt

The choice is by mean score on fresh tasks of the kinds trained on (seeds 100 to 103 of each), from both kinds of
start; the held-out kinds choose nothing. The card gets the chosen policy's results on the held-out kinds, and where it
fails.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from jel.errors import JelError
from jel.policy_lstm import load_lhopt_policy, save_lhopt_policy
from jel.tasks.small.bank import BankTask, load_bank, worth_learning
from jel.tasks.small.kinds import HELD_OUT, TRAINING
from jel.validation_guard import KEEP
from nanochat.common import base_dir, print0, run_main
from scripts.lhopt.evaluate import HELD_OUT_SEEDS, STARTS, Results, controlled, policy_path
from scripts.lhopt.tables import bootstrap_interval
from scripts.lhopt.train import bank_folder

CHOICE_SEEDS = (100, 101, 102, 103)  # of each kind trained on; no training run has seen these tasks
FAILURE = -0.2  # a mean score below this is one


def scores_of(results: Results, path: Path, tasks: list[BankTask], starts: str) -> Tensor:
    """Scores (N, R) of a policy on the tasks."""
    key, compute = controlled(path, "mean", starts)
    return torch.stack([t.paired_score(results.row(key, t, lambda t=t: compute(t))) for t in tasks])


def held_out_record(tasks: list[BankTask], scores: Tensor) -> dict:
    """Mean score with its bootstrap interval, by kind, and the tasks where it fails."""
    by_kind: dict[str, list[float]] = defaultdict(list)
    for task, row in zip(tasks, scores):
        by_kind[task.spec["kind"]].append(row.mean().item())
    low, high = bootstrap_interval(scores)
    return {
        "score": scores.mean().item(),
        "interval_95": [low, high],
        "by_kind": {kind: sum(v) / len(v) for kind, v in by_kind.items()},
        "fails_on": {t.name: row.mean().item() for t, row in zip(tasks, scores) if row.mean() < FAILURE},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", required=True, help="tags under runs/")
    parser.add_argument("--out", required=True, help="path of the policy's two files, without suffix")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = Results(base_dir() / "lhopt" / "results")
    paths = [policy_path(name) for name in args.policies]
    choice = {}
    if len(paths) > 1:
        fresh = worth_learning(load_bank(TRAINING, CHOICE_SEEDS, bank_folder()))
        for path in paths:
            score = torch.cat([scores_of(results, path, fresh, starts) for starts in STARTS]).mean().item()
            print0(f"{path.parent.name}: {score:.3f} on {len(fresh)} fresh tasks of the kinds trained on")
            choice[path.parent.name] = score
    chosen = max(paths, key=lambda path: choice.get(path.parent.name, 0.0))
    policy, card = load_lhopt_policy(chosen)
    tasks = load_bank(HELD_OUT, HELD_OUT_SEEDS, bank_folder())
    record = {starts: held_out_record(tasks, scores_of(results, chosen, tasks, starts)) for starts in STARTS}
    save_lhopt_policy(
        policy,
        args.out,
        card["training"],
        decisions=card["decisions"],
        meaning_of_scores="0: AdamW 1e-3 constant, decay 1e-2; 1: the best of 42 AdamW runs, with hindsight; "
        "runs under the policy go back from blow-ups and "
        f"end with the mean of their {KEEP} best weights on validation (jel.ValidationGuard)",
        chosen_among=choice,
        held_out=record,
    )
    print0(f"shipped {chosen.parent.name} to {args.out}")
    return 0


if __name__ == "__main__":
    run_main(main, JelError)
