"""The Gaussian policy (paper 3.5, A.1), its numpy twin that makes a decision cheap, and its files.

Shapes: S state size, A actions, `...` any leading axes (none, E episodes, or E x K decisions).
A saved policy is two files: `<path>.safetensors`, the weights, and `<path>.json`, the card that says what they are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from jel.actions import ACTIONS, scales_from_actions
from jel.errors import JelError
from jel.files import json_bytes, read_bytes, read_json, write_files

LOG_STD_RANGE = (-5.0, 2.0)  # A.1
INITIAL_OUTPUT_GAIN = 0.01  # assumption, the paper is silent: small, so that the first mean multipliers are about 1
FORMAT, VERSION = "jel-policy", 1
ARCHITECTURE = ("n_state", "hidden", "n_actions", "action_range")  # what rebuilds a policy, together with its weights


# -----------------------------------------------------------------------------
# the network


class GaussianPolicy(nn.Module):
    """State -> Linear -> tanh -> Linear -> tanh -> Linear -> (means, log standard deviations), as in A.1.

    The actions are the raw ones, before the tanh of 3.3, which with `action_range` r gives multipliers in [1/r, r].
    Weights come from `seed` alone: the global generator is neither read nor advanced, so that a run with a controller
    draws the same numbers as the run without. Raises `JelError` for sizes, a log std or a range that make no sense.
    """

    def __init__(
        self,
        n_state: int = 1,
        hidden: int = 64,
        n_actions: int = 2,
        seed: int = 0,
        initial_log_std: float = -0.5,
        action_range: float = 100.0,
    ):  # Table 2
        super().__init__()
        sizes = (n_state, hidden, n_actions)
        if not all(type(n) is int and 0 < n <= 4096 for n in sizes):
            raise JelError(f"n_state, hidden and n_actions must be integers from 1 to 4096, not {sizes}")
        if not LOG_STD_RANGE[0] <= initial_log_std <= LOG_STD_RANGE[1]:
            raise JelError(f"initial_log_std is {initial_log_std}; it must lie in {list(LOG_STD_RANGE)}")
        if not (isinstance(action_range, (int, float)) and 1 < action_range <= 1e6):
            raise JelError(f"action_range is {action_range!r}; it must be a number above 1 and at most 1e6")
        self.n_state, self.hidden, self.n_actions, self.action_range = *sizes, float(action_range)
        linear = lambda a, b: nn.utils.skip_init(nn.Linear, a, b)
        self.net = nn.Sequential(
            linear(n_state, hidden), nn.Tanh(), linear(hidden, hidden), nn.Tanh(), linear(hidden, 2 * n_actions)
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (self.net[0], self.net[2]):
                bound = layer.in_features**-0.5
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)
            nn.init.orthogonal_(self.net[4].weight, gain=INITIAL_OUTPUT_GAIN, generator=generator)
            self.net[4].bias[:n_actions], self.net[4].bias[n_actions:] = 0.0, initial_log_std

    @property
    def is_progress_policy(self) -> bool:
        """Whether it maps [t/T] to one multiplier per action, as the paper's does."""
        return (self.n_state, self.n_actions) == (1, len(ACTIONS))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """States (..., S) -> mean (..., A) and log_std (..., A) of the raw action."""
        mean, log_std = self.net(states).chunk(2, dim=-1)
        return mean, log_std.clamp(*LOG_STD_RANGE)

    @torch.no_grad()
    def act(self, states: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """States (..., S), normal noise (..., A) -> raw actions `mean + std * noise` (..., A) and log-densities (...).

        One state at a time: a batched product's rounding depends on the batch, and an episode's bits must not depend
        on how episodes are split over ranks and chunks.
        """
        actions, log_probs = torch.empty_like(noise), noise.new_empty(noise.shape[:-1])
        for i in np.ndindex(noise.shape[:-1]):
            mean, log_std = self(states[i])
            actions[i] = mean + log_std.exp() * noise[i]
            log_probs[i] = gaussian_log_prob(actions[i], mean, log_std)
        return actions, log_probs

    def sample(self, states: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`act` with noise from the generator: (..., S) -> (..., A) and (...)."""
        return self.act(states, torch.randn(*states.shape[:-1], self.n_actions, generator=generator))

    def log_prob(self, states: Tensor, actions: Tensor) -> Tensor:
        """Log-density of the raw actions, summed over A: (..., S), (..., A) -> (...)."""
        return gaussian_log_prob(actions, *self(states))

    def entropy(self, states: Tensor) -> Tensor:
        """Differential entropy in nats per action dimension, i.e. the mean over A: (..., S) -> (...).

        0.919 at log_std -0.5; the mean, because summed (1.84) it could not be set beside the paper's 0.3-0.5.
        """
        return (0.5 * math.log(2 * math.pi * math.e) + self(states)[1]).mean(-1)

    def mean_scales(self, states: Tensor) -> Tensor:
        """Multipliers of the mean action, the ones a deployed controller uses: (..., S) -> (..., A)."""
        return scales_from_actions(self(states)[0], self.action_range)


def gaussian_log_prob(actions: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of a diagonal Gaussian, summed over the last axis: (..., A) x 3 -> (...)."""
    z = (actions - mean) * (-log_std).exp()
    return (-0.5 * z * z - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


# -----------------------------------------------------------------------------
# the numpy twin: 3 small matrix-vector products, without torch's overhead per call


@dataclass(frozen=True)
class ProgressWeights:
    """What the mean action of a policy of progress is made of: a float64 copy, untouched by later training."""

    layers: list[tuple[np.ndarray, np.ndarray]]  # (weight, bias); of the last layer only the rows of the means
    action_range: float


def progress_weights(policy: GaussianPolicy) -> ProgressWeights:
    """Copy the policy's weights; raises `JelError` for a policy that is not one of progress alone."""
    if not policy.is_progress_policy:
        raise JelError(
            f"the policy maps {policy.n_state} numbers to {policy.n_actions} actions; "
            f"this needs one that maps [progress] to {len(ACTIONS)} ({', '.join(ACTIONS)})"
        )
    layers = [
        (layer.weight.detach().cpu().double().numpy(), layer.bias.detach().cpu().double().numpy())
        for layer in policy.net
        if isinstance(layer, nn.Linear)
    ]
    weight, bias = layers.pop()
    return ProgressWeights([*layers, (weight[: policy.n_actions], bias[: policy.n_actions])], policy.action_range)


def numpy_multipliers(weights: ProgressWeights, progress: float) -> dict[str, float]:
    """The multipliers of the mean action, by name: `multipliers(mean_scales([progress]))`, in float64."""
    *hidden, (weight, bias) = weights.layers
    x = np.array([progress])
    for w, b in hidden:
        x = np.tanh(w @ x + b)
    scales = np.exp(math.log(weights.action_range) * np.tanh(weight @ x + bias))
    return dict(zip(ACTIONS, scales.tolist(), strict=True))


def multiplier_table(policy: GaussianPolicy, progresses: Sequence[float]) -> list[dict[str, float]]:
    """`[{"progress": p, "lr": m, "weight_decay": m}, ...]`, a row per progress; raises as `progress_weights`."""
    weights = progress_weights(policy)
    return [{"progress": float(p), **numpy_multipliers(weights, p)} for p in progresses]


# -----------------------------------------------------------------------------
# files


def default_policy_path() -> Path:
    """The policy that is shipped with the package, without suffix."""
    return Path(__file__).parent / "policies" / "default"


def policy_files(path: str | Path) -> tuple[Path, Path]:
    """(weights, card) of a policy; `path` may carry the suffix of either, or none."""
    stem = str(path).removesuffix(".safetensors").removesuffix(".json")
    return Path(stem + ".safetensors"), Path(stem + ".json")


def policy_digest(policy: GaussianPolicy) -> str:
    """The name of this very policy: the sha256 of the weights file, followed by the action range as text."""
    return _digest(safetensors.torch.save(policy.state_dict()), policy.action_range)


def _digest(weights: bytes, action_range: float) -> str:
    return hashlib.sha256(weights + str(action_range).encode()).hexdigest()


def save_policy(policy: GaussianPolicy, path: str | Path, card: dict) -> None:
    """Write the two files. `card`: how the policy was trained, JSON values; it goes under "training".

    Raises `JelError`, and leaves what is there, if a weight is not finite or the files cannot be written.
    """
    if not _all_finite(policy.state_dict()):
        raise JelError(f"policy not saved to {path}: its weights are not finite; its training has diverged")
    whole = {
        "format": FORMAT,
        "version": VERSION,
        **{key: getattr(policy, key) for key in ARCHITECTURE},
        "sha256": policy_digest(policy),
        "multipliers": _card_table(policy),
        "training": card,
    }
    weights_path, card_path = policy_files(path)
    write_files({weights_path: safetensors.torch.save(policy.state_dict()), card_path: json_bytes(whole)})


def load_policy(path: str | Path) -> tuple[GaussianPolicy, dict]:
    """Read a policy and its whole card; `path` with or without suffix. Nothing in the files is executed.

    Raises `JelError` in one line for a missing, damaged, foreign, mismatched or non-finite policy.
    """
    weights_path, card_path = policy_files(path)
    data, card = read_bytes(weights_path, "policy"), read_json(card_path, "policy card")
    if not isinstance(card, dict) or (card.get("format"), card.get("version")) != (FORMAT, VERSION):
        raise JelError(f"policy card {card_path} is not a {FORMAT} card of version {VERSION}")
    try:
        policy = GaussianPolicy(**{key: card.get(key) for key in ARCHITECTURE})
    except JelError as e:
        raise JelError(f"policy card {card_path}: {e}") from None
    if _digest(data, policy.action_range) != card.get("sha256"):
        raise JelError(f"policy {weights_path} does not match the sha256 on its card: damaged, or from another save")
    try:
        tensors = safetensors.torch.load(data)
    except Exception as e:  # whatever a parser of foreign bytes may raise
        raise JelError(f"policy {weights_path} is not a safetensors file ({e})") from None
    layout = lambda state: {name: (t.dtype, t.shape) for name, t in state.items()}
    if layout(tensors) != layout(policy.state_dict()):
        raise JelError(f"policy {weights_path} holds other tensors than its card's sizes ask for")
    if not _all_finite(tensors):
        raise JelError(f"policy {weights_path} holds weights that are not finite")
    policy.load_state_dict(tensors)
    try:  # to 0.01%, because machines round differently
        pairs = zip(card["multipliers"], _card_table(policy), strict=True)
        agrees = all(math.isclose(told[key], value, rel_tol=1e-4) for told, own in pairs for key, value in own.items())
    except (KeyError, TypeError, ValueError, OverflowError):
        agrees = False
    if not agrees:
        raise JelError(f"policy card {card_path}: its table of multipliers is not that of the weights")
    return policy, card


def _card_table(policy: GaussianPolicy) -> list[dict[str, float]]:
    return multiplier_table(policy, [i / 20 for i in range(21)]) if policy.is_progress_policy else []


def _all_finite(state: dict[str, Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in state.values())
