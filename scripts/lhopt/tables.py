"""Tables of an evaluation: scores with bootstrap intervals, mean ranks, and raw losses beside them.

Shapes: M methods, N tasks, R seeds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from jel.tasks.small.bank import BankTask
from nanochat.common import print0

RESAMPLES = 2000


def bootstrap_interval(scores: Tensor, seed: int = 0) -> tuple[float, float]:
    """The 95% interval of the mean of scores (N, R), resampling tasks, and within them seeds."""
    generator = torch.Generator().manual_seed(seed)
    n, r = scores.shape
    tasks = torch.randint(n, (RESAMPLES, n, 1), generator=generator)
    seeds = torch.randint(r, (RESAMPLES, n, r), generator=generator)
    means = scores[tasks, seeds].mean((1, 2))
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975])).tolist()
    return low, high


def mean_ranks(losses: Sequence[Sequence[Tensor]]) -> Tensor:
    """M methods' losses on N tasks, each (R,) -> each method's mean rank, 1 is best (M,)."""
    stacked = torch.stack([torch.stack(list(row)) for row in losses])  # (M, N, R)
    better = (stacked[None] < stacked[:, None]).sum(1)
    same = (stacked[None] == stacked[:, None]).sum(1)
    return (1 + better + (same - 1) / 2).mean((1, 2))


def score_table(tasks: Sequence[BankTask], lines: Sequence[dict]) -> str:
    """Mean score with its interval, by kind, worst task, rank and price: Markdown."""
    by_kind: dict[str, list[int]] = defaultdict(list)
    for i, task in enumerate(tasks):
        by_kind[task.spec["kind"]].append(i)
    ranks = mean_ranks([line["losses"] for line in lines])
    head = ["method", "score, 95% interval", *by_kind, "worst task", "mean rank", "runs for a second task"]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line, rank in zip(lines, ranks):
        scores = torch.stack([task.paired_score(losses) for task, losses in zip(tasks, line["losses"])])
        low, high = bootstrap_interval(scores)
        means = scores.mean(1)
        worst = int(means.argmin())
        cells = [f"{scores.mean():.2f} ({low:.2f}, {high:.2f})"]
        cells += [f"{means[at].mean():.2f}" for at in by_kind.values()]
        cells += [f"{means[worst]:.2f} {tasks[worst].name}", f"{rank:.1f}", f"{line['price']:g}"]
        rows.append("| " + " | ".join([line["method"], *cells]) + " |")
    return "\n".join(rows)


def loss_table(tasks: Sequence[BankTask], lines: Sequence[dict]) -> str:
    """Mean test loss by method and task, and the standard error over seeds: Markdown."""
    head = ["method", *(task.name for task in tasks)]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in lines:
        cells = [f"{x.mean():.4f} ± {x.std() / len(x) ** 0.5:.4f}" for x in line["losses"]]
        rows.append("| " + " | ".join([line["method"], *cells]) + " |")
    return "\n".join(rows)


def print_tables(tasks: Sequence[BankTask], lines: Sequence[dict]) -> None:
    print0("\n" + score_table(tasks, lines))
    print0("\nTest losses, mean and standard error over seeds:\n\n" + loss_table(tasks, lines))
