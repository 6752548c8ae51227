"""LHOPT's policy: unitless features -> layer-norm LSTM -> one categorical head a knob; and its two files.

Shapes: `...` any leading axes (none in a live loop, E episodes in training), K decisions, F features, A knobs,
H hidden. A saved policy is `<path>.safetensors`, the weights, and `<path>.json`, the card; nothing in them executes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from jel.actions import RelativeSteps, Restart, StepKnob
from jel.errors import JelError
from jel.files import json_bytes, read_bytes, read_json, write_files
from jel.policy import all_finite, files_digest, load_weights, policy_files
from jel.unitless import END_WEIGHTS, feature_names, new_memory

FORMAT, VERSION = "lhopt-policy", 1
CLIP = 2.0  # normalised features are clipped to +-this (the paper's)
LEAST_STD = 0.02  # a feature that hardly varied in training is not blown up when it does


class Act(NamedTuple):
    """What a policy does at a decision."""

    moves: Tensor  # (..., A): see RelativeSteps.apply
    register: Tensor  # (...) a choice of Restart; 0, nothing, for a policy without registers
    state: Tensor  # (2, ..., H) for the next decision


class LayerNormLSTM(nn.Module):
    """An LSTM whose gates and cell are layer-normalised (Ba et al., 2016): (..., D) and state (2, ..., H) -> H."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.hidden = hidden
        self.from_input = nn.Linear(inputs, 4 * hidden, bias=False)
        self.from_hidden = nn.Linear(hidden, 4 * hidden, bias=False)
        self.norm_input, self.norm_hidden = nn.LayerNorm(4 * hidden), nn.LayerNorm(4 * hidden, bias=False)
        self.norm_cell = nn.LayerNorm(hidden)

    def initial_state(self, shape: Sequence[int] = ()) -> Tensor:
        return torch.zeros(2, *shape, self.hidden)

    def cell(self, projected: Tensor, state: Tensor) -> Tensor:
        """One step from the input's projection (..., 4H): the new state (2, ..., H), hidden first."""
        h, c = state[0], state[1]
        gates = projected + self.norm_hidden(self.from_hidden(h))
        keep, write, read, new = gates.chunk(4, dim=-1)
        c = torch.sigmoid(keep + 1) * c + torch.sigmoid(write) * torch.tanh(new)
        return torch.stack([torch.sigmoid(read) * torch.tanh(self.norm_cell(c)), c])

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """A sequence (K, ..., D) -> hidden states (K, ..., H) and the last state."""
        projected = self.norm_input(self.from_input(x))
        hidden = []
        for row in projected:
            state = self.cell(row, state)
            hidden.append(state[0])
        return torch.stack(hidden), state


class Normaliser(nn.Module):
    """Keeps mean and variance of what it is shown in training, and gives (x - mean) / std clipped to +-`CLIP`."""

    mean: Tensor
    var: Tensor
    seen: Tensor

    def __init__(self, size: int, beta: float = 0.99):
        super().__init__()
        self.beta = beta
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("seen", torch.zeros(()))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Learn from a batch (..., size): exponential averages, as long as few batches have been seen plain means."""
        flat = x.flatten(0, -2)
        self.seen += 1
        weight = max(1 - self.beta, 1 / float(self.seen))
        gap = flat.mean(0) - self.mean
        self.var += weight * (flat.var(0, correction=0) + (1 - weight) * gap.square() - self.var)
        self.mean += weight * gap

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / self.var.sqrt().clamp_min(LEAST_STD)).clamp(-CLIP, CLIP)


class Trunk(nn.Module):
    """Normalised inputs -> Linear, tanh -> layer-norm LSTM -> Linear, tanh: actor and value function have one each.

    Without `recurrent` the LSTM's place is taken by a layer of its size.
    """

    def __init__(self, inputs: int, hidden: int, recurrent: bool = True):
        super().__init__()
        self.norm = Normaliser(inputs)
        self.before = nn.Linear(inputs, hidden)
        self.lstm = LayerNormLSTM(hidden, hidden) if recurrent else None
        self.after = nn.Linear(hidden, hidden)
        self.hidden = hidden

    def initial_state(self, shape: Sequence[int] = ()) -> Tensor:
        return torch.zeros(2, *shape, self.hidden)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """(K, ..., inputs) -> (K, ..., H) and the last state."""
        x = torch.tanh(self.before(self.norm(x)))
        if self.lstm is not None:
            x, state = self.lstm(x, state)
        return torch.tanh(self.after(x)), state


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Weights from the generator alone: matrices uniform within 1/sqrt(inputs), biases 0, norms at 1."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 2:
                p.uniform_(-(p.shape[1] ** -0.5), p.shape[1] ** -0.5, generator=generator)
            else:
                p.fill_(1.0 if name.endswith("weight") else 0.0)


class LstmPolicy(nn.Module):
    """The actor. `act` is what a live loop calls; `sample` and `evaluate` are for learning.

    Raises `JelError` for sizes or knobs that make no sense.
    """

    def __init__(
        self,
        knobs: Sequence[StepKnob],
        end_weights: Sequence[float] = END_WEIGHTS,
        hidden: int = 64,
        registers: int = 0,
        recurrent: bool = True,
        seed: int = 0,
    ):
        super().__init__()
        if not (type(hidden) is int and 0 < hidden <= 4096):
            raise JelError(f"hidden is {hidden!r}; it must be an integer from 1 to 4096")
        if not all(isinstance(k, (int, float)) and math.isfinite(k) and k >= 1 for k in end_weights):
            raise JelError(f"end weights {list(end_weights)} must be numbers from 1 up")
        self.actions, self.restart = RelativeSteps(knobs), Restart(registers)
        self.end_weights, self.hidden, self.recurrent = tuple(end_weights), hidden, recurrent
        self.features = feature_names(self.actions.names, self.end_weights)
        # two more features a register: how its loss and its age compare with the run's
        self.n_features = len(self.features) + 2 * registers
        self.sizes = (*self.actions.sizes, *([self.restart.size] if registers else []))
        with torch.random.fork_rng(devices=[]):  # the global generator is neither read nor advanced
            self.trunk = Trunk(self.n_features, hidden, recurrent)
            self.heads = nn.Linear(hidden, sum(self.sizes))
        initialise(self, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.heads.weight.mul_(0.01)

    def initial_state(self, shape: Sequence[int] = ()) -> Tensor:
        """What `act` is given at a run's first decision: (2, ..., H)."""
        return self.trunk.initial_state(shape)

    def new_memory(self, shape: Sequence[int] = ()) -> dict[str, Tensor]:
        """What `jel.unitless.observe` is given at a run's first decision."""
        return new_memory(shape, self.end_weights)

    def log_probs(self, features: Tensor, state: Tensor) -> tuple[list[Tensor], Tensor]:
        """A sequence (K, ..., F) -> log-probabilities a head, each (K, ..., steps), and the last state."""
        hidden, state = self.trunk(features, state)
        return [x.log_softmax(-1) for x in self.heads(hidden).split(self.sizes, dim=-1)], state

    @torch.no_grad()
    def act(self, features: Tensor, state: Tensor, greedy: bool = False) -> Act:
        """Features (..., F) of one decision -> the mean move of each knob; with `greedy`, the likeliest."""
        heads, state = self.log_probs(features[None], state)
        heads = [x[0] for x in heads]
        knobs = heads[: len(self.actions.knobs)]
        if greedy:
            moves = self.actions.moves(torch.stack([x.argmax(-1) for x in knobs], dim=-1))
        else:
            moves = self.actions.expected_moves([x.exp() for x in knobs])
        register = (
            heads[-1].argmax(-1) if self.restart.registers else torch.zeros(features.shape[:-1], dtype=torch.long)
        )
        return Act(moves, register, state)

    @torch.no_grad()
    def sample(
        self, features: Tensor, state: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features (E, F) -> choices (E, heads), their log-probability (E,) summed over heads, and the new state."""
        heads, state = self.log_probs(features[None], state)
        choices = torch.stack([torch.multinomial(x[0].exp(), 1, generator=generator)[:, 0] for x in heads], dim=-1)
        return choices, chosen([x[0] for x in heads], choices), state

    def evaluate(self, features: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Whole episodes (K, E, F) and choices (K, E, heads) -> log-probability and entropy, each (K, E)."""
        heads, _ = self.log_probs(features, self.initial_state(features.shape[1:-1]))
        entropy = torch.stack([-(x.exp() * x).sum(-1) for x in heads]).sum(0)
        return chosen(heads, choices), entropy

    def architecture(self) -> dict:
        """What rebuilds the policy together with its weights, as JSON values."""
        return {
            "knobs": [knob.to_json() for knob in self.actions.knobs],
            "end_weights": list(self.end_weights),
            "hidden": self.hidden,
            "registers": self.restart.registers,
            "recurrent": self.recurrent,
        }


def chosen(heads: Sequence[Tensor], choices: Tensor) -> Tensor:
    """Log-probability of the choices (..., heads), summed over heads (...)."""
    return torch.stack([x.gather(-1, choices[..., i, None])[..., 0] for i, x in enumerate(heads)]).sum(0)


# -----------------------------------------------------------------------------
# files


def default_lhopt_path() -> Path:
    """The policy that is shipped with the package, without suffix."""
    return Path(__file__).parent / "policies" / "lhopt"


def save_lhopt_policy(policy: LstmPolicy, path: str | Path, card: dict, **top: object) -> None:
    """Write the two files. `card`: how it was trained, JSON values, under "training"; `top`: more of the card itself.

    Raises `JelError`, and leaves what is there, if a weight is not finite or the files cannot be written.
    """
    state = policy.state_dict()
    if not all_finite(state):
        raise JelError(f"policy not saved to {path}: its weights are not finite; its training has diverged")
    weights = safetensors.torch.save(state)
    shape = policy.architecture()
    whole = {
        "format": FORMAT,
        "version": VERSION,
        **shape,
        "sha256": files_digest(weights, shape),
        **top,
        "training": card,
    }
    weights_path, card_path = policy_files(path)
    write_files({weights_path: weights, card_path: json_bytes(whole)})


def load_lhopt_policy(path: str | Path | None = None) -> tuple[LstmPolicy, dict]:
    """Read a policy and its whole card; None: the shipped one. Nothing in the files is executed.

    Raises `JelError` in one line for a missing, damaged, foreign, mismatched or non-finite policy.
    """
    weights_path, card_path = policy_files(path or default_lhopt_path())
    data, card = read_bytes(weights_path, "policy"), read_json(card_path, "policy card")
    if not isinstance(card, dict) or (card.get("format"), card.get("version")) != (FORMAT, VERSION):
        raise JelError(f"policy card {card_path} is not a {FORMAT} card of version {VERSION}")
    try:
        if not isinstance(card.get("knobs"), list) or not isinstance(card.get("end_weights"), list):
            raise JelError("it lists no knobs or no end weights")
        policy = LstmPolicy(
            [StepKnob.from_json(knob) for knob in card["knobs"]],
            card["end_weights"],
            card.get("hidden", 0),
            card.get("registers", 0),
            card.get("recurrent") is not False,
        )
    except JelError as e:
        raise JelError(f"policy card {card_path}: {e}") from None
    if files_digest(data, policy.architecture()) != card.get("sha256"):
        raise JelError(f"policy {weights_path} does not match the sha256 on its card: damaged, or from another save")
    load_weights(policy, data, weights_path)
    return policy.requires_grad_(False), card
