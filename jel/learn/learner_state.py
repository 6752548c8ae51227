"""A policy and its Adam as nested dicts: what the updates of a policy save and continue from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jel.errors import JelError
from jel.policy import GaussianPolicy


def make_adam(policy: GaussianPolicy, lr: float) -> torch.optim.Adam:
    """Adam over the policy, its state made early, as Adam itself would, so that it always has one layout."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    for p in policy.parameters():
        optimizer.state[p] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


def learner_state(policy: GaussianPolicy, optimizer: torch.optim.Adam, generator: torch.Generator) -> dict:
    """Copies: nested dicts with string keys and tensors at the leaves."""
    adam = {
        name: {key: value.clone() for key, value in optimizer.state[p].items()} for name, p in policy.named_parameters()
    }
    weights = {name: value.clone() for name, value in policy.state_dict().items()}
    return {"policy": weights, "optimizer": adam, "generator": generator.get_state()}


def load_learner_state(
    state: dict, policy: GaussianPolicy, optimizer: torch.optim.Adam, generator: torch.Generator
) -> None:
    """Continue from a `learner_state`. Raises `JelError`, and changes nothing, if it is of another policy network."""
    if layout(state) != layout(learner_state(policy, optimizer, generator)):
        raise JelError("the saved policy update does not fit this policy network; resume with the same sizes")
    policy.load_state_dict(state["policy"])
    generator.set_state(state["generator"])
    for name, p in policy.named_parameters():
        for key, value in optimizer.state[p].items():
            value.copy_(state["optimizer"][name][key])


def layout(tree: Any) -> Any:
    """The shape of a nested dict: its keys, and at each leaf the tensor's shape."""
    if isinstance(tree, dict):
        return {key: layout(value) for key, value in tree.items()}
    return tuple(tree.shape) if isinstance(tree, Tensor) else type(tree)
