"""The Gaussian policy (paper 3.5, A.1), its numpy twin that makes a decision cheap, and its files.

Shapes: S state size, A actions, `...` any leading axes (none, E episodes, or E x K decisions).
A saved policy is two files: `<path>.safetensors`, the weights, and `<path>.json`, the card that says what they are.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from jel.actions import ACTIONS, LOG_RANGE, scales_from_actions
from jel.errors import JelError

LOG_STD_RANGE = (-5.0, 2.0)  # A.1
INITIAL_LOG_STD = -0.5       # A.1
INITIAL_OUTPUT_GAIN = 0.01   # assumption, the paper is silent: small, so that the first mean multipliers are about 1
FORMAT, VERSION, SIZES = "jel-policy", 1, ("n_state", "hidden", "n_actions")


# -----------------------------------------------------------------------------
# the network

class GaussianPolicy(nn.Module):
    """State -> Linear -> tanh -> Linear -> tanh -> Linear -> (means, log standard deviations), as in A.1.

    The actions are the raw ones, before the tanh of 3.3. Weights come from `seed` alone: the global generator is
    neither read nor advanced, so that a run with a controller draws the same numbers as the run without.
    """

    def __init__(self, n_state: int = 1, hidden: int = 64, n_actions: int = 2, seed: int = 0):
        super().__init__()
        self.n_state, self.hidden, self.n_actions = n_state, hidden, n_actions
        linear = lambda a, b: nn.utils.skip_init(nn.Linear, a, b)
        self.net = nn.Sequential(linear(n_state, hidden), nn.Tanh(), linear(hidden, hidden), nn.Tanh(),
                                 linear(hidden, 2 * n_actions))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (self.net[0], self.net[2]):
                bound = layer.in_features ** -0.5
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)
            nn.init.orthogonal_(self.net[4].weight, gain=INITIAL_OUTPUT_GAIN, generator=generator)
            self.net[4].bias[:n_actions] = 0.0
            self.net[4].bias[n_actions:] = INITIAL_LOG_STD

    @property
    def is_progress_policy(self) -> bool:
        """Whether it maps [t/T] to one multiplier per action, as the paper's does."""
        return (self.n_state, self.n_actions) == (1, len(ACTIONS))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """States (..., S) -> mean (..., A) and log_std (..., A) of the raw action."""
        mean, log_std = self.net(states).chunk(2, dim=-1)
        return mean, log_std.clamp(*LOG_STD_RANGE)

    @torch.no_grad()
    def sample(self, states: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """States (..., S) -> sampled raw actions (..., A) and their log-densities (...)."""
        mean, log_std = self(states)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        actions = mean + log_std.exp() * noise
        return actions, gaussian_log_prob(actions, mean, log_std)

    def log_prob(self, states: Tensor, actions: Tensor) -> Tensor:
        """Log-density of the raw actions, summed over A: (..., S), (..., A) -> (...)."""
        return gaussian_log_prob(actions, *self(states))

    def entropy(self, states: Tensor) -> Tensor:
        """Differential entropy in nats per action dimension, i.e. the mean over A: (..., S) -> (...).

        0.919 at the initial log_std; the mean, because summed (1.84) it could not be set beside the paper's 0.3-0.5.
        """
        return (0.5 * math.log(2 * math.pi * math.e) + self(states)[1]).mean(-1)

    def mean_scales(self, states: Tensor) -> Tensor:
        """Multipliers of the mean action, the ones a deployed controller uses: (..., S) -> (..., A)."""
        return scales_from_actions(self(states)[0])


def gaussian_log_prob(actions: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of a diagonal Gaussian, summed over the last axis: (..., A) x 3 -> (...)."""
    z = (actions - mean) * (-log_std).exp()
    return (-0.5 * z * z - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


# -----------------------------------------------------------------------------
# the numpy twin: 3 small matrix-vector products, without torch's overhead per call

def numpy_weights(policy: GaussianPolicy) -> list[tuple[np.ndarray, np.ndarray]]:
    """A float64 copy of the (weight, bias) of each layer; of the last one only the rows of the means."""
    layers = [(layer.weight.detach().cpu().double().numpy(), layer.bias.detach().cpu().double().numpy())
              for layer in policy.net if isinstance(layer, nn.Linear)]
    weight, bias = layers.pop()
    return [*layers, (weight[:policy.n_actions], bias[:policy.n_actions])]


def numpy_mean(weights: list[tuple[np.ndarray, np.ndarray]], state: Sequence[float]) -> np.ndarray:
    """The mean raw action (A,) for one state of S numbers: `forward(state)[0]`, in float64."""
    *hidden, (weight, bias) = weights
    x = np.asarray(state, dtype=np.float64)
    for w, b in hidden:
        x = np.tanh(w @ x + b)
    return weight @ x + bias


def numpy_multipliers(weights: list[tuple[np.ndarray, np.ndarray]], state: Sequence[float]) -> dict[str, float]:
    """The multipliers of the mean action, by name: `multipliers(mean_scales(state))`, in float64."""
    scales = np.exp(LOG_RANGE * np.tanh(numpy_mean(weights, state)))
    return dict(zip(ACTIONS, scales.tolist(), strict=True))


def multiplier_table(policy: GaussianPolicy, progresses: Sequence[float]) -> list[dict[str, float]]:
    """`[{"progress": p, "lr": m, "weight_decay": m}, ...]`, a row per progress; raises `JelError` as below."""
    weights = progress_weights(policy)
    return [{"progress": float(p), **numpy_multipliers(weights, (p,))} for p in progresses]


def progress_weights(policy: GaussianPolicy) -> list[tuple[np.ndarray, np.ndarray]]:
    """`numpy_weights` of a policy of progress alone; raises `JelError` for one with other inputs or outputs."""
    if not policy.is_progress_policy:
        raise JelError(f"the policy maps {policy.n_state} numbers to {policy.n_actions} actions; "
                       f"this needs one that maps [progress] to {len(ACTIONS)} ({', '.join(ACTIONS)})")
    return numpy_weights(policy)


# -----------------------------------------------------------------------------
# files

def default_policy_path() -> Path:
    """The policy that is shipped with the package, without suffix."""
    return Path(__file__).parent / "policies" / "default"


def policy_files(path: str | Path) -> tuple[Path, Path]:
    """(weights, card) of a policy; `path` may carry the suffix of either, or none."""
    stem = str(path).removesuffix(".safetensors").removesuffix(".json")
    return Path(stem + ".safetensors"), Path(stem + ".json")


def policy_bytes(policy: GaussianPolicy) -> bytes:
    """The weights as the bytes of a safetensors file; equal weights give equal bytes."""
    return safetensors.torch.save({name: t.cpu().contiguous() for name, t in policy.state_dict().items()})


def policy_digest(policy: GaussianPolicy) -> str:
    """The sha256 of `policy_bytes`: the name of these very weights."""
    return hashlib.sha256(policy_bytes(policy)).hexdigest()


def save_policy(policy: GaussianPolicy, path: str | Path, card: dict) -> None:
    """Write the two files. `card`: how the policy was trained, JSON values; it goes under "training".

    Raises `JelError`, and leaves what is there, if a weight is not finite or the files cannot be written.
    """
    if not _all_finite(policy.state_dict()):
        raise JelError(f"policy not saved to {path}: its weights are not finite; its training has diverged")
    table = multiplier_table(policy, [i / 20 for i in range(21)]) if policy.is_progress_policy else []
    whole = {"format": FORMAT, "version": VERSION, **{key: getattr(policy, key) for key in SIZES},
             "sha256": policy_digest(policy), "multipliers": table, "training": card}
    weights_path, card_path = policy_files(path)
    write_files({weights_path: policy_bytes(policy), card_path: json_bytes(whole)})


def load_policy(path: str | Path) -> tuple[GaussianPolicy, dict]:
    """Read a policy and its whole card; `path` with or without suffix. Nothing in the files is executed.

    Raises `JelError` in one line for a missing, damaged, foreign, mismatched or non-finite policy.
    """
    weights_path, card_path = policy_files(path)
    data, card = read_bytes(weights_path, "policy"), read_json(card_path, "policy card")
    if not isinstance(card, dict) or (card.get("format"), card.get("version")) != (FORMAT, VERSION):
        raise JelError(f"policy card {card_path} is not a {FORMAT} card of version {VERSION}")
    sizes = [card.get(key) for key in SIZES]
    if not all(type(n) is int and 0 < n <= 4096 for n in sizes):
        raise JelError(f"policy card {card_path}: {', '.join(SIZES)} must be integers from 1 to 4096, not {sizes}")
    if hashlib.sha256(data).hexdigest() != card.get("sha256"):
        raise JelError(f"policy {weights_path} does not match the sha256 on its card: damaged, or from another save")
    policy = GaussianPolicy(*sizes)
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
    _check_table(policy, card, card_path)
    return policy, card


def _check_table(policy: GaussianPolicy, card: dict, card_path: Path) -> None:
    """The multipliers that people read on the card are those of the weights, to 0.01% (machines round differently)."""
    try:
        rows = [tuple(row[key] for key in ("progress", *ACTIONS)) for row in card["multipliers"]]
        told = multiplier_table(policy, [row[0] for row in rows]) if rows else []
        agrees = all(math.isclose(told[i][key], value, rel_tol=1e-4)
                     for i, row in enumerate(rows) for key, value in zip(ACTIONS, row[1:]))
    except (KeyError, TypeError, ValueError, OverflowError):
        agrees = False
    if not agrees:
        raise JelError(f"policy card {card_path}: its table of multipliers is not that of the weights")


def _all_finite(state: dict[str, Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in state.values())


def json_bytes(value) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def write_files(contents: dict[Path, bytes]) -> None:
    """Write files so that a reader sees each one old or new, never half; raises `JelError` if that fails.

    All are on disk under temporary names before the first is renamed, so files that belong together change together
    but for a kill between two renames, which `load_policy` notices.
    """
    temporary = {path: path.with_name(f".{path.name}.tmp") for path in contents}
    try:
        for path, data in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary[path], "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
        for path in contents:
            os.replace(temporary[path], path)
    except OSError as e:
        raise JelError(f"cannot write {path} ({e.strerror or e})") from None


def read_bytes(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise JelError(f"{what} {path} does not exist") from None
    except (OSError, ValueError) as e:  # ValueError: a NUL in the path
        raise JelError(f"{what} {path} cannot be read ({e})") from None


def read_json(path: Path, what: str):
    """The value in a JSON file; raises `JelError` if it is missing or malformed."""
    try:
        return json.loads(read_bytes(path, what))
    except (ValueError, RecursionError) as e:
        raise JelError(f"{what} {path} is not JSON ({e})") from None
