"""Figures of LHOPT: how training went, and what a policy does to the hyperparameters of tasks it never saw.

    python -m scripts.lhopt.figures --policies lhopt/tiny-s42 lhopt/tiny-s43 --control lhopt/tiny-s43

Writes learning.png and control.png to $NANOCHAT_BASE_DIR/lhopt/.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from jel.errors import JelError
from jel.learn.control import run
from jel.policy_lstm import default_lhopt_path, load_lhopt_policy
from jel.tasks.small.bank import SEEDS, load_bank
from jel.tasks.small.episodes import DEFAULTS
from jel.tasks.small.kinds import HELD_OUT
from jel.validation_guard import KEEP
from nanochat.common import base_dir, print0, run_main
from nanochat.run_log import read_log
from scripts.lhopt.evaluate import policy_path
from scripts.lhopt.rivals import starts_of
from scripts.lhopt.train import bank_folder
from scripts.runs import run_folder

SMOOTH = 10  # updates


def learning_figure(tags: Sequence[str], path: Path) -> None:
    """Score of the episodes as they were drawn, exploration and random starts included, over episodes."""
    fig, ax = plt.subplots(figsize=(6, 3.5))
    for tag in tags:
        records = read_log(run_folder(tag))
        scores, episodes = [r["score"] for r in records], [r["episodes"] for r in records]
        means = [sum(scores[max(0, i - SMOOTH + 1) : i + 1]) / min(SMOOTH, i + 1) for i in range(len(scores))]
        ax.plot([sum(episodes[: i + 1]) for i in range(len(means))], means, label=tag)
    ax.axhline(0, color="grey", lw=0.8)
    ax.set(xlabel="episodes", ylabel=f"score, mean of {SMOOTH} updates", title="Training, choices drawn, random starts")
    ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def control_figure(found: Path, path: Path) -> None:
    """Each hyperparameter over progress on a task of each held-out kind, from random starts, a line a guarded run."""
    policy, card = load_lhopt_policy(found)
    names, decisions = policy.actions.names, int(card["decisions"])
    fig, axes = plt.subplots(len(names), len(HELD_OUT), figsize=(3 * len(HELD_OUT), 2 * len(names)), sharex=True)
    for column, kind in enumerate(HELD_OUT):
        (task,) = load_bank([kind], [0], bank_folder())
        starts = torch.cat([starts_of(task, SEEDS[:6]), torch.tensor(DEFAULTS)[None]])
        t = run(policy, task, SEEDS[:7], starts, decisions, keep=KEEP)
        progress = torch.arange(decisions) / decisions
        for row, name in enumerate(names):
            ax = axes[row][column]
            ax.semilogy(progress, t.values[:, :6, row], color="tab:blue", lw=0.8, alpha=0.7)
            ax.semilogy(progress, t.values[:, 6, row], color="tab:red", lw=1.4)
            ax.set_ylabel(name if column == 0 else "")
            ax.set_title(kind if row == 0 else "", fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("progress")
    fig.suptitle("Held-out kinds: random starts (blue), AdamW's defaults (red)", fontsize=10)
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", required=True, help="tags under runs/, whose training is drawn")
    parser.add_argument("--control", default="", help="whose control is drawn: a tag or a path; none: the shipped one")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    out = base_dir() / "lhopt"
    out.mkdir(parents=True, exist_ok=True)
    learning_figure(args.policies, out / "learning.png")
    control_figure(policy_path(args.control) if args.control else default_lhopt_path(), out / "control.png")
    print0(f"figures in {out}")
    return 0


if __name__ == "__main__":
    run_main(main, JelError)
