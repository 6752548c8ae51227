"""Returns, baselines and advantages of a group of episodes (paper 3.5). Pure functions.

Shapes: E episodes (the group), K decisions. `alive` (E, K) is False for the decisions after an episode has blown up;
they take no part in anything.
"""

from __future__ import annotations

import torch
from torch import Tensor


def discounted_returns(rewards: Tensor, alive: Tensor, gamma: float) -> Tensor:
    """`R_k = sum over k' >= k of gamma^(k' - k) r_k'` (eq. 1): (E, K) -> (E, K), 0 where not alive."""
    rewards = torch.where(alive, rewards, 0.0)
    returns = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for k in reversed(range(rewards.shape[1])):
        returns[:, k] = following = rewards[:, k] + gamma * following
    return returns


def group_advantages(returns: Tensor, alive: Tensor) -> Tensor:
    """Return minus the group's mean return at the same decision index (eq. 2, 3): (E, K) -> (E, K).

    Mean over the alive members; 0 where not alive. Divided by nothing: neither by a standard deviation nor a length.
    """
    baseline = _mean_over_alive(returns, alive)  # (1, K)
    return torch.where(alive, returns - baseline, 0.0)


def standard_grpo_advantages(returns: Tensor, alive: Tensor, eps: float = 1e-6) -> Tensor:
    """With both normalisations of standard GRPO, for the paper's ablation (4.4): (E, K) -> (E, K).

    Variance: divided by the group's standard deviation at the same decision index. Length: GRPO averages an episode's
    terms over its own length before it averages over episodes; weighting a term by (mean length / own length) says
    the same to a loss that averages over all alive samples, and is 1 when every episode lives to its end.
    """
    advantages = group_advantages(returns, alive)
    deviation = _mean_over_alive(advantages.square(), alive).sqrt()  # (1, K)
    lengths = alive.sum(1, keepdim=True).to(returns.dtype)  # (E, 1)
    mean_length = lengths.sum() / (lengths > 0).sum().clamp(min=1)
    return advantages / (deviation + eps) * mean_length / lengths.clamp(min=1)


def _mean_over_alive(x: Tensor, alive: Tensor) -> Tensor:
    """Mean over the episodes that are alive at each decision: (E, K) -> (1, K), 0 where none is."""
    return torch.where(alive, x, 0.0).sum(0, keepdim=True) / alive.sum(0, keepdim=True).clamp(min=1)


def total_returns(rewards: Tensor, alive: Tensor, gamma: float) -> Tensor:
    """One return for all decisions of an episode: the sum of its rewards, the total fall of the probe loss -> (E, K).

    Right for noise that hardly changes within an episode: every decision then took part in all of the result.
    `gamma` is not used: what counts is the end.
    """
    return torch.where(alive, rewards, 0.0).sum(1, keepdim=True).expand_as(rewards)


def controlled_returns(rewards: Tensor, alive: Tensor, gamma: float) -> Tensor:
    """`total_returns` with the loss at the decision as a control variate -> (E, K).

    What an episode gained before decision k is known there and owes nothing to it. Its part of the total, by least
    squares over the alive members of the group, is taken off: the coefficient is 0 for the first decision; 1 would
    give the undiscounted reward-to-go. Right for noise that is independent between decisions: with correlated noise
    what came before tells of the action too. `gamma` is not used.
    """
    rewards = torch.where(alive, rewards, 0.0)
    total, before = total_returns(rewards, alive, gamma), rewards.cumsum(1) - rewards  # (E, K)
    centred = torch.where(alive, before - _mean_over_alive(before, alive), 0.0)
    share = (centred * total).sum(0) / centred.square().sum(0).clamp_min(1e-12)  # (K,)
    return total - share * centred


RETURNS = {"reward-to-go": discounted_returns, "total": total_returns, "controlled": controlled_returns}
