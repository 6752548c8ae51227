"""The policy network of JEL (paper 3.5, A.1), and the two files that a policy is saved as.

Shapes: S features, A knobs, `...` any leading axes (none, E episodes, or E x K decisions).
A saved policy is `<path>.safetensors`, the weights, and `<path>.json`, the card that says what they are.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from jel.actions import LogScale
from jel.errors import JelError
from jel.features import feature_vector, observations_of
from jel.files import json_bytes, read_bytes, read_json, write_files
from jel.knobs import Knob

LOG_STD_RANGE = (-5.0, 2.0)  # A.1
INITIAL_OUTPUT_GAIN = 0.01  # assumption, the paper is silent: small, so that the first mean multipliers are about 1
FORMAT, VERSION = "jel-policy", 2

# The paper's two actions (3.3): one multiplier in [0.01, 100] on every group's learning rate, one on its weight decay.
PAPER_KNOBS = (Knob("lr", "lr"), Knob("weight_decay", "weight_decay"))


# -----------------------------------------------------------------------------
# the network


class GaussianPolicy(nn.Module):
    """Features -> Linear -> tanh -> Linear -> tanh -> Linear -> (means, log standard deviations), as in A.1.

    It knows what it observes (`features`, see jel/features.py) and what it turns (`knobs`); its raw actions become
    multipliers through `actions`. Weights come from `seed` alone: the global generator is neither read nor advanced,
    so that a run with a controller draws the same numbers as the run without.
    Raises `JelError` for sizes, features, knobs or a log standard deviation that make no sense.
    """

    recurrent = False  # what it does at a decision depends on the features of that decision alone

    def __init__(
        self,
        knobs: Sequence[Knob] = PAPER_KNOBS,
        features: Sequence[str] = ("progress",),
        hidden: int = 64,
        seed: int = 0,
        initial_log_std: float = -0.5,
    ):  # Table 2
        super().__init__()
        if not (type(hidden) is int and 0 < hidden <= 4096):
            raise JelError(f"hidden is {hidden!r}; it must be an integer from 1 to 4096")
        if not features:
            raise JelError("a policy needs at least one feature")
        if not LOG_STD_RANGE[0] <= initial_log_std <= LOG_STD_RANGE[1]:
            raise JelError(f"initial_log_std is {initial_log_std}; it must lie in {list(LOG_STD_RANGE)}")
        self.features, self.hidden, self.actions = tuple(features), hidden, LogScale(knobs)
        self.initial_log_std = initial_log_std
        self.observes = observations_of(features)
        self.n_features, self.n_actions = len(self.features), len(self.knobs)
        sizes = (self.n_features, hidden), (hidden, hidden), (hidden, 2 * self.n_actions)
        first, second, last = layers = [nn.utils.skip_init(nn.Linear, a, b) for a, b in sizes]
        self.net = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in layers[:2]:
                bound = layer.in_features**-0.5
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)
            nn.init.orthogonal_(last.weight, gain=INITIAL_OUTPUT_GAIN, generator=generator)
            last.bias[: self.n_actions], last.bias[self.n_actions :] = 0.0, initial_log_std

    @property
    def knobs(self) -> tuple[Knob, ...]:
        return self.actions.knobs

    def untrained(self, seed: int) -> GaussianPolicy:
        """Another one of the same choices, its weights drawn anew."""
        return GaussianPolicy(self.knobs, self.features, self.hidden, seed, self.initial_log_std)

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

    def log_prob(self, states: Tensor, actions: Tensor) -> Tensor:
        """Log-density of the raw actions, summed over A: (..., S), (..., A) -> (...)."""
        return gaussian_log_prob(actions, *self(states))

    def entropy(self, states: Tensor) -> Tensor:
        """Differential entropy in nats per action dimension, i.e. the mean over A: (..., S) -> (...).

        0.919 at log_std -0.5; the mean, because summed (1.84) it could not be set beside the paper's 0.3-0.5.
        """
        return (0.5 * math.log(2 * math.pi * math.e) + self(states)[1]).mean(-1)

    @torch.no_grad()
    def mean_multipliers(self, observation: dict[str, float | Tensor]) -> dict[str, dict[str, float | Tensor]]:
        """What a deployed controller does at an observation: the multipliers of the mean action.

        Floats for an observation of floats, tensors (E,) for tensors.
        """
        return self.actions.multipliers(self(feature_vector(self.features, observation))[0])

    def architecture(self) -> dict:
        """What rebuilds the policy together with its weights, as JSON values."""
        return {
            "features": list(self.features),
            "hidden": self.hidden,
            "knobs": [knob.to_json() for knob in self.knobs],
        }


def gaussian_log_prob(actions: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of a diagonal Gaussian, summed over the last axis: (..., A) x 3 -> (...)."""
    z = (actions - mean) * (-log_std).exp()
    return (-0.5 * z * z - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def multiplier_table(policy: GaussianPolicy, progresses: Sequence[float]) -> list[dict]:
    """`[{"progress": p, "multipliers": {group: {hyperparameter: m}}}, ...]`, the mean action's, a row per progress.

    Raises `JelError` for a policy that observes more than progress: what it does depends on the run.
    """
    if policy.observes != {"progress"}:
        raise JelError(f"the policy observes {', '.join(sorted(policy.observes))}; this needs one of progress alone")
    return [{"progress": float(p), "multipliers": policy.mean_multipliers({"progress": p})} for p in progresses]


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
    """The name of this very policy: the sha256 of its weights file and of what they are the weights of."""
    return files_digest(safetensors.torch.save(policy.state_dict()), policy.architecture())


def files_digest(weights: bytes, architecture: dict) -> str:
    """The sha256 of a weights file and of what its tensors are the weights of."""
    return hashlib.sha256(weights + json.dumps(architecture, sort_keys=True).encode()).hexdigest()


def save_policy(policy: GaussianPolicy, path: str | Path, card: dict) -> None:
    """Write the two files. `card`: how the policy was trained, JSON values; it goes under "training".

    Raises `JelError`, and leaves what is there, if a weight is not finite or the files cannot be written.
    """
    if not all_finite(policy.state_dict()):
        raise JelError(f"policy not saved to {path}: its weights are not finite; its training has diverged")
    whole = {"format": FORMAT, "version": VERSION, **policy.architecture(), "sha256": policy_digest(policy)}
    if policy.observes == {"progress"}:
        whole["multipliers"] = multiplier_table(policy, [i / 10 for i in range(10)])  # for people; never read back
    weights_path, card_path = policy_files(path)
    write_files(
        {
            weights_path: safetensors.torch.save(policy.state_dict()),
            card_path: json_bytes({**whole, "training": card}),
        }
    )


def load_policy(path: str | Path) -> tuple[GaussianPolicy, dict]:
    """Read a policy and its whole card; `path` with or without suffix. Nothing in the files is executed.

    Raises `JelError` in one line for a missing, damaged, foreign, mismatched or non-finite policy.
    """
    weights_path, card_path = policy_files(path)
    data, card = read_bytes(weights_path, "policy"), read_json(card_path, "policy card")
    if not isinstance(card, dict) or (card.get("format"), card.get("version")) != (FORMAT, VERSION):
        raise JelError(f"policy card {card_path} is not a {FORMAT} card of version {VERSION}")
    try:
        features, knobs = card.get("features"), card.get("knobs")
        if not isinstance(features, list) or not isinstance(knobs, list):
            raise JelError("it lists no features or no knobs")
        policy = GaussianPolicy([Knob.from_json(knob) for knob in knobs], features, card.get("hidden", 0))
    except JelError as e:
        raise JelError(f"policy card {card_path}: {e}") from None
    if files_digest(data, policy.architecture()) != card.get("sha256"):
        raise JelError(f"policy {weights_path} does not match the sha256 on its card: damaged, or from another save")
    load_weights(policy, data, weights_path)
    return policy, card


def load_weights(policy: nn.Module, data: bytes, path: Path) -> None:
    """Put the tensors of a weights file, read from `path`, into a policy of its card's sizes.

    Raises `JelError` in one line for bytes that are no safetensors file, other tensors, or weights that are not finite.
    """
    try:
        tensors = safetensors.torch.load(data)
    except Exception as e:  # whatever a parser of foreign bytes may raise
        raise JelError(f"policy {path} is not a safetensors file ({e})") from None
    layout = lambda state: {name: (t.dtype, t.shape) for name, t in state.items()}
    if layout(tensors) != layout(policy.state_dict()):
        raise JelError(f"policy {path} holds other tensors than its card's sizes ask for")
    if not all_finite(tensors):
        raise JelError(f"policy {path} holds weights that are not finite")
    policy.load_state_dict(tensors)


def all_finite(state: dict[str, Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in state.values())
