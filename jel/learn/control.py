"""Episodes of a small task under an LHOPT policy: what is seen, chosen and reached.

Shapes: E episodes, K decisions, A knobs, H heads, F features, Q privileged values (what the value function sees beside
the features).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from jel.policy_lstm import LstmPolicy
from jel.tasks.small.bank import BankTask
from jel.tasks.small.episodes import DEFAULTS, HYPERPARAMETERS, Episodes
from jel.unitless import observe
from jel.validation_guard import CUT, RETREATS, WORSE

LR = HYPERPARAMETERS.index("lr")
PRIVILEGED = 12  # numbers of `privileged`, before the one-hot of the task


@dataclass(frozen=True)
class Trajectories:
    """What episodes leave behind; decisions on the first axis."""

    features: Tensor  # (K, E, F)
    choices: Tensor  # (K, E, H)
    log_probs: Tensor  # (K, E)
    privileged: Tensor  # (K, E, Q)
    values: Tensor  # (K, E, A) hyperparameters after each decision
    val: Tensor  # (K + 1, E) validation losses at the decisions and at the end
    final: Tensor  # (E,) test loss
    score: Tensor  # (E,) normalised and clipped

    @staticmethod
    def join(parts: Sequence[Trajectories]) -> Trajectories:
        """The episodes of all parts, in order."""
        columns = zip(*(part._tensors() for part in parts))
        return Trajectories(*(torch.cat(c, dim=min(c[0].ndim - 1, 1)) for c in columns))

    def of(self, episodes: Tensor) -> Trajectories:
        """Those episodes for which `episodes` (E,) is True."""
        return Trajectories(*(x[episodes] if x.ndim == 1 else x[:, episodes] for x in self._tensors()))

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in fields(self)]


def boundaries(steps: int, decisions: int) -> list[int]:
    """The steps at which decisions are made, and the end: K + 1 numbers that rise, 0 first."""
    return [round(k * steps / decisions) for k in range(decisions + 1)]


def run(
    policy: LstmPolicy,
    task: BankTask,
    seeds: Sequence[int],
    starts: Tensor,
    decisions: int,
    *,
    generator: torch.Generator | None = None,
    greedy: bool = False,
    deterministic: Tensor | None = None,
    averaged: LstmPolicy | None = None,
    hide_val: bool = False,
    keep: int = 0,
    retreats: int = RETREATS,
    task_index: int = 0,
    n_tasks: int = 1,
) -> Trajectories:
    """One run a seed from hyperparameters `starts` (E, 4). With a generator choices are drawn, else `act` decides.

    `averaged` acts, without drawing, in those episodes where `deterministic` (E,) is True. Knobs are found by their
    hyperparameter's name; hyperparameters that no knob turns stay at their start. `hide_val`: the controller is not
    shown the validation loss. `keep`: a run ends with the mean of the weights that had so many of the best validation
    losses at the decisions and at the end, and goes back to its best weights at most `retreats` times, as under
    `jel.ValidationGuard`; 0: no guard, it ends with its last weights.
    """
    e, small = len(seeds), task.task
    episodes = Episodes(small, seeds)
    columns = [HYPERPARAMETERS.index(k.knob.hyperparameter) for k in policy.actions.knobs]
    values, start = starts.clone(), starts[:, columns]
    edges = boundaries(small.steps, decisions)
    memory, state = policy.new_memory((e,)), policy.initial_state((e,))
    other = averaged.initial_state((e,)) if averaged is not None else None
    last_move = torch.zeros(e, len(columns))
    record: dict[str, list[Tensor]] = {
        name: [] for name in ("features", "choices", "log_probs", "privileged", "values")
    }
    curve: list[Tensor] = []
    best = Best(e, keep, retreats)
    registers = Registers(policy.restart.registers, e)
    for k, (first, after) in enumerate(zip(edges, edges[1:])):
        val = episodes.evaluate("val")
        curve.append(val)
        if keep:
            best.see(episodes.flat, val)
            values[:, LR] *= best.retreat(episodes, val)
        features, memory = observe(
            memory,
            progress=torch.tensor(first / small.steps),
            inner=episodes.inner,
            train_loss=episodes.train_loss,
            val_loss=torch.full_like(val, math.nan) if hide_val else val,
            param_norm=episodes.param_norm(),
            outer_update=episodes.outer_update,
            path=episodes.path,
            relative=policy.actions.relative(values[:, columns], start),
            last_move=last_move,
            end_weights=policy.end_weights,
        )
        features = torch.cat([features, registers.features(val, k / decisions)], dim=-1)
        if generator is not None:
            choices, log_probs, state = policy.sample(features, state, generator)
            moves = policy.actions.moves(choices[:, : len(columns)])
            register = choices[:, -1] if policy.restart.registers else None
        else:
            decided = policy.act(features, state, greedy)
            moves, register, state = decided
            choices, log_probs = torch.zeros(e, len(policy.sizes), dtype=torch.long), torch.zeros(e)
        if averaged is not None and deterministic is not None:
            decided = averaged.act(features, other, greedy)  # type: ignore[arg-type]
            moves, other = torch.where(deterministic[:, None], decided.moves, moves), decided.state
        absolute = privileged(task, values, episodes.train_loss, val, task_index, n_tasks)
        values[:, columns] = policy.actions.apply(values[:, columns], moves)
        for name, x in zip(record, (features, choices, log_probs, absolute, values[:, columns])):
            record[name].append(x.clone())
        last_move = moves
        if register is not None and policy.restart.registers:
            registers.act(policy, episodes, register, val, k / decisions)
        episodes.train(after - first, values)
    curve.append(episodes.evaluate("val"))
    if keep:
        best.see(episodes.flat, curve[-1])
        best.load(episodes)
    final = episodes.evaluate("test")
    stacked = {name: torch.stack(rows) for name, rows in record.items()}
    return Trajectories(**stacked, val=torch.stack(curve), final=final, score=task.score(final))


def privileged(task: BankTask, values: Tensor, train: Tensor, val: Tensor, index: int, n_tasks: int) -> Tensor:
    """What a deployed policy cannot know -> (E, `PRIVILEGED` + n_tasks): absolute values, losses, the task."""
    e, small = len(values), task.task
    log = lambda x: (x.clamp_min(0) + 1e-8).log().nan_to_num(0.0, 0.0, 0.0)
    numbers = [
        math.log(small.steps),
        math.log(small.n_params),
        math.log(small.batch),
        math.log(len(small.train.inputs)),
    ]
    rest = [log(torch.tensor(x)).item() for x in (task.default, task.oracle)]
    rows = torch.cat(
        [
            torch.tensor([*numbers, *rest]).expand(e, -1),
            values.log(),
            torch.stack([log(val), task.score(val)], -1),
        ],
        dim=-1,
    )
    one_hot = torch.zeros(e, n_tasks)
    one_hot[:, index] = 1.0
    return torch.cat([rows, one_hot], dim=-1)


def random_starts(seeds: int, generator: torch.Generator, noise: Sequence[tuple[float, float]]) -> Tensor:
    """Hyperparameters (E, 4): the defaults times log-uniform factors within `noise`, a (low, high) each."""
    low, high = (torch.tensor(x).log() for x in zip(*noise))
    factor = (low + (high - low) * torch.rand(seeds, len(noise), generator=generator)).exp()
    return torch.tensor(DEFAULTS) * factor


class Best:
    """The `keep` weights (keep, E, P) of each episode that validated best so far: what a guard does, at its looks."""

    def __init__(self, e: int, keep: int, retreats: int = RETREATS):
        self.val, self.flat = torch.full((keep, e), math.inf), torch.empty(0)
        self.first, self.left = torch.empty(0), torch.full((e,), retreats)

    def see(self, flat: Tensor, val: Tensor) -> None:
        """Weights (E, P) and their validation losses (E,): they take the place of the worst held, where better."""
        if not len(self.flat):
            self.flat, self.first = flat.new_zeros(len(self.val), *flat.shape), val
        self.first = torch.where(self.first.isfinite(), self.first, val)
        worst, at = self.val.max(0)
        e = (val < worst).nonzero()[:, 0]
        self.val[at[e], e], self.flat[at[e], e] = val[e], flat[e]

    def _best(self) -> Tensor:
        return self.flat[self.val.argmin(0), torch.arange(len(self.left))]

    def retreat(self, episodes: Episodes, val: Tensor) -> Tensor:
        """Put episodes that validate worse than at first back to their best weights; the factor of each rate (E,)."""
        back = ~(val <= self.first + WORSE * self.first.abs()) & (self.left > 0) & self.val.isfinite().any(0)
        if back.any():
            self.left = self.left - back.long()
            episodes.put_back(self._best(), back)
        return torch.where(back, CUT, 1.0)

    def load(self, episodes: Episodes) -> None:
        """End the episodes with the mean of the weights held, or the best if it validates worse than the second best.

        As `jel.ValidationGuard.load_best`: a uniform soup (Wortsman et al., arXiv 2203.05482) of one run's weights.
        Episodes that never had a finite validation loss stay as they are.
        """
        held = self.val.isfinite()
        last, any_held = episodes.flat, held.any(0)[:, None]
        best = self._best()
        episodes.flat = torch.einsum("ke,kep->ep", held / held.sum(0).clamp_min(1), self.flat)
        second = torch.minimum(held.sum(0) - 1, torch.tensor(1)).clamp_min(0)  # of one alone, itself
        as_good = episodes.evaluate("val") <= self.val.sort(0).values.gather(0, second[None])[0]
        episodes.flat = torch.where(any_held, torch.where(as_good[:, None], episodes.flat, best), last)


class Registers:
    """The checkpoint registers of E episodes: what each one's loss and age are, for the policy to see."""

    def __init__(self, registers: int, e: int):
        self.loss = torch.full((registers, e), math.nan)
        self.progress = torch.zeros(registers, e)

    def features(self, val: Tensor, progress: float) -> Tensor:
        """(E, 2 x registers): log of the register's loss over the run's, through tanh; how long ago; 0 where empty."""
        gap = torch.tanh((self.loss.clamp_min(0) + 1e-8).log() - (val.clamp_min(0) + 1e-8).log())
        age = torch.where(self.loss.isnan(), 0.0, progress - self.progress)
        return torch.stack([gap.nan_to_num(0.0), age], dim=-1).permute(1, 0, 2).flatten(1)

    def act(self, policy: LstmPolicy, episodes: Episodes, choices: Tensor, val: Tensor, progress: float) -> None:
        for r in range(policy.restart.registers):
            saves = policy.restart.saves(choices, r)
            loads = policy.restart.loads(choices, r) & ~self.loss[r].isnan()
            episodes.save(r, saves)
            episodes.load(r, loads)
            self.loss[r] = torch.where(saves, val, self.loss[r])
            self.progress[r] = torch.where(saves, progress, self.progress[r])
