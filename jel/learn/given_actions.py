"""Policies that do what they are told: constants, or actions given as if they were noise."""

from __future__ import annotations

import torch
from torch import Tensor

from jel.policy import GaussianPolicy


def set_constant(policy: GaussianPolicy, raw: Tensor, log_std: float = 0.0) -> None:
    """Make the policy's mean action `raw` (A,) everywhere, and its log standard deviation `log_std`."""
    last, n = policy.net[-1], policy.n_actions
    assert isinstance(last, torch.nn.Linear)
    with torch.no_grad():
        last.weight.zero_()
        last.bias[:n], last.bias[n:] = raw, log_std


def given_actions(policy: GaussianPolicy) -> GaussianPolicy:
    """A policy with the same knobs and features, of mean 0 and standard deviation 1: the noise is the action."""
    unit = GaussianPolicy(policy.knobs, policy.features)
    set_constant(unit, torch.zeros(policy.n_actions))
    return unit
