"""The reward of a decision (paper 3.4), and what a run that blows up is worth. Pure functions.

Shapes: E episodes, K decisions, A actions. Probe loss k is read before decision k, probe loss k + 1 after the steps
that decision k governed, so K decisions come with K + 1 losses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jel.errors import JelError


def rewards(
    probe_losses: Tensor, actions: Tensor, grad_norms: Tensor | None, lambda_g: float, lambda_s: float
) -> Tensor:
    """`(L_k - L_{k+1}) - lambda_g g_k - lambda_s |tanh(a_k) - tanh(a_{k-1})|^2` (paper 3.4) -> (E, K).

    `probe_losses` (E, K + 1), raw `actions` (E, K, A), `grad_norms` (E, K), needed only for `lambda_g` other than 0.
    The first decision has none before it and pays no smoothness penalty. Not guarded: see `bounded_rewards`.
    """
    result = probe_losses[:, :-1] - probe_losses[:, 1:]  # (E, K)
    if lambda_g:
        if grad_norms is None:
            raise JelError("a gradient penalty needs gradient norms, and this task reports none; set it to 0")
        result = result - lambda_g * grad_norms
    if lambda_s:
        jumps = torch.tanh(actions).diff(dim=1).square().sum(-1)  # (E, K - 1)
        result = result - lambda_s * torch.cat([torch.zeros_like(result[:, :1]), jumps], dim=1)
    return result


def bounded_rewards(
    probe_losses: Tensor,
    actions: Tensor,
    grad_norms: Tensor | None,
    lambda_g: float,
    lambda_s: float,
    nan_penalty: float | None,
) -> tuple[Tensor, Tensor]:
    """`rewards`, made safe for episodes that blow up -> rewards (E, K) and the bool mask alive (E, K).

    An episode ends at decision k when its reward is not finite, or when the probe loss rises over that interval by
    more than L_0, the episode's starting loss. Decision k then gets `-nan_penalty` and is still alive, since it is to
    blame; the later ones are not alive, and their reward is 0. An episode whose first loss is not finite is never
    alive. `nan_penalty` None means L_0: as bad as losing everything there was to gain, so worse than any run that
    merely fails to learn, yet of the same size as ordinary returns, so that one blow-up shifts its group's baseline
    instead of drowning it. A rise is limited because a loss that is finite but huge would poison the baseline as
    surely as a NaN. (Our reading; the paper is silent.)
    """
    raw = rewards(probe_losses, actions, grad_norms, lambda_g, lambda_s)
    first = probe_losses[:, :1]
    penalty = first.abs() if nan_penalty is None else torch.full_like(first, nan_penalty)  # (E, 1)
    ends = ~raw.isfinite() | (probe_losses.diff(dim=1) > first.abs())  # (E, K)
    ended_before = ends.cumsum(dim=1) - ends.long() > 0
    alive = ~ended_before & first.isfinite()
    return torch.where(alive, torch.where(ends, -penalty, raw), 0.0), alive
