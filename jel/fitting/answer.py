"""What the learning ends with, where it has no groups left to compare its policies by episodes.

Shapes: N episodes, K decisions, A knobs, C candidates.
"""

from __future__ import annotations

import torch

from jel.fitting.compare import Rows
from jel.learn.actor_critic import ActorCriticUpdate
from jel.learn.meta import MetaTrainer
from jel.policy import multiplier_table

SHARE = 4  # the best 1 / SHARE of the episodes


@torch.no_grad()
def surest(trainer: MetaTrainer) -> Rows:
    """The multipliers at an episode's K decisions whose return is highest even if the critic is a little wrong.

    Few episodes leave the critic vague, and following its gradient may then lead to where nothing was tried. So the
    policy's mean actions stand beside those of the best episodes and the mean of these, and what has the highest
    lower bound, the critic's mean less its `pessimism` standard deviations, is taken. Costs no episode.
    """
    policy, updater = trainer.policy, trainer.updater
    assert isinstance(updater, ActorCriticUpdate)
    points = [first / trainer.env.task.num_steps(0) for first, _ in trainer.env.decisions(0)]
    seen = updater.state_dict()["episodes"]
    raw, groups, returns = (seen[name] for name in ("raw", "groups", "returns"))
    better = returns - torch.stack([returns[groups == g].mean() for g in groups])  # than its own group's mean
    best = raw[better.topk(-(-len(raw) // SHARE)).indices]
    own = policy(torch.tensor(points)[:, None])[0]
    candidates = torch.stack([own, best.mean(0), *best])  # (C, K, A)
    chosen = int(updater.critic.returns(candidates, updater.pessimism).argmax())
    if chosen == 0:
        return multiplier_table(policy, points)
    rows = zip(points, candidates[chosen])
    return [{"progress": float(p), "multipliers": policy.actions.multipliers(actions)} for p, actions in rows]
