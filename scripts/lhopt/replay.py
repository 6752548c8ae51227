"""Schedule transfer: what a policy did on a small transformer, replayed on larger ones, beside live control.

    python -m scripts.lhopt.replay                         the shipped policy
    python -m scripts.lhopt.replay --policy lhopt/tiny-s42

Two ways on each size, from AdamW's default start: live control, and replay of the multipliers that live control
chose on the smallest model (their geometric mean over seeds, by progress). All start alike, so that relative and
absolute replay are the same. Live control has its guard, so it ends with the mean of its best weights; the others end
with their last. The baseline is the better of AdamW 1e-3 constant and cosine. A speed-up is T over the step at which a
method first has the baseline's final validation loss, read off the losses of the run itself at the decisions; "not
reached": it never has it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from jel.errors import JelError
from jel.learn.control import boundaries, run
from jel.policy_lstm import LstmPolicy, default_lhopt_path, load_lhopt_policy
from jel.tasks.small.bank import SCHEDULES, SETTINGS, BankTask
from jel.tasks.small.episodes import DEFAULTS, HYPERPARAMETERS, Episodes
from jel.tasks.small.kinds import Spec, draw
from jel.validation_guard import KEEP
from nanochat.common import print0, run_main
from scripts.lhopt.evaluate import policy_path

SIZES = ((32, 1), (64, 1), (80, 2))  # width and layers: 4 and 10 times the parameters of the first, but for tables
STEPS = 200


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="", help="tag under runs/ or a path; none: the shipped one")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=STEPS)
    return parser


def task_of(width: int, layers: int, steps: int) -> BankTask:
    spec: Spec = {**draw("transformer", 0), "width": width, "layers": layers, "steps": steps, "batch": 16, "length": 16}
    return BankTask(spec, torch.zeros(len(SETTINGS), 1))  # no bank here: losses are compared, not scores


def follow(task: BankTask, seeds: Sequence[int], schedule: Tensor) -> tuple[Tensor, Tensor]:
    """Train under hyperparameters (K, 4) by decision -> validation losses (K + 1, R), test losses at the end (R,)."""
    episodes, curve = Episodes(task.task, seeds, measure=False), []
    edges = boundaries(task.task.steps, len(schedule))
    for values, a, b in zip(schedule, edges, edges[1:]):
        curve.append(episodes.evaluate("val"))
        episodes.train(b - a, values.expand(len(seeds), -1))
    return torch.stack([*curve, episodes.evaluate("val")]), episodes.evaluate("test")


def live(policy: LstmPolicy, task: BankTask, seeds: Sequence[int], decisions: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `follow`, under live control; and the hyperparameters chosen (K, 4), their geometric mean over seeds."""
    t = run(policy, task, seeds, torch.tensor(DEFAULTS).repeat(len(seeds), 1), decisions, keep=KEEP)
    schedule = torch.tensor(DEFAULTS).repeat(decisions, 1)
    columns = [HYPERPARAMETERS.index(k.knob.hyperparameter) for k in policy.actions.knobs]
    schedule[:, columns] = t.values.log().mean(1).exp()
    return t.val, t.final, schedule


def speedup(curve: Tensor, goal: float) -> float:
    """1 / the share of the run after which the curve (K + 1,) is first at the goal, straight lines between; or 0."""
    below = (curve <= goal).nonzero()
    if not len(below):
        return 0.0
    k = max(int(below[0]), 1)
    share = float((curve[k - 1] - goal) / (curve[k - 1] - curve[k]).clamp_min(1e-12))
    return (len(curve) - 1) / (k - 1 + min(max(share, 0.0), 1.0))


def main(argv: list[str] | None = None) -> int:
    args = flags().parse_args(argv)
    torch.set_num_threads(1)
    policy, card = load_lhopt_policy(policy_path(args.policy) if args.policy else default_lhopt_path())
    decisions, seeds = int(card["decisions"]), range(1000, 1000 + args.seeds)
    print0("| parameters | method | test loss | speed-up to the baseline's final loss |\n|---|---|---|---|")
    recorded = None
    for width, layers in SIZES:
        task = task_of(width, layers, args.steps)
        centres = [(k + 0.5) / decisions for k in range(decisions)]
        base = {}
        for name in ("constant", "cosine"):
            schedule = torch.tensor(DEFAULTS).repeat(decisions, 1)
            schedule[:, 0] *= torch.tensor([SCHEDULES[name](p) for p in centres])
            base[f"AdamW 1e-3 {name}"] = follow(task, seeds, schedule)
        goal = min(float(curve[-1].mean()) for curve, _ in base.values())
        curve, final, schedule = live(policy, task, seeds, decisions)
        recorded = schedule if recorded is None else recorded
        curves = {
            **base,
            "live control": (curve, final),
            "replay of the smallest model's schedule": follow(task, seeds, recorded),
        }
        for name, (curve, final) in curves.items():
            gain = speedup(curve.mean(1), goal)
            shown = f"{gain:.2f}" if gain else "not reached"
            print0(f"| {task.task.n_params:,} | {name} | {final.mean():.4f} ± {final.std():.4f} | {shown} |")
    return 0


if __name__ == "__main__":
    run_main(main, JelError)
