"""Successive halving (Jamieson and Talwalkar, 2016) over constants, candidates proposed by Optuna's TPE sampler.

A bracket goes up a ladder of rungs: many candidates are trained for a quarter of an episode, the best of them again
for a half, the best of those to the end. Every rung costs what one group of whole episodes costs, so that so many
groups are the same price by any method. The candidates of a rung share their starts, and each rung has other starts
than the one below: what won by a lucky start has to win again. E episodes of a group, A knobs, K decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from jel.errors import JelError
from jel.learn.shared_results import Finding

SHARES = (4, 2, 1)  # a rung is the K-th part of an episode, in decisions
EDGE = 0.999  # of tanh(raw): the edge of a knob's bounds is at infinity


def rungs(decisions: int) -> list[int]:
    """After how many decisions candidates are compared, the last after all of them.

    >>> rungs(12), rungs(5), rungs(1)
    ([3, 6, 12], [1, 2, 5], [1])
    """
    return sorted({max(1, decisions // share) for share in SHARES})


def rung_size(episodes: int, steps: int, whole: int) -> int:
    """How many candidates may train for `steps` steps at the price of `episodes` episodes of `whole` steps."""
    return max(1, episodes * whole // steps)


@dataclass(eq=False)
class Candidate:
    """One setting on its way up; `trial` is Optuna's record of it, None for another process's."""

    raw: Tensor  # (A,)
    trial: Any = None
    returns: list[float] = field(default_factory=list)  # of the rungs so far


class HalvingSearch:
    """A `Searcher` (see jel/learn/search.py) for `updates` groups; needs `optuna`.

    The winner of the bracket before stands in the last rung of the next one, beside the best that other processes
    have found, and what wins there is deployed. Groups that are too few for another bracket are play-offs between the
    best finishers. Raises `JelError` if the package is not installed.
    """

    def __init__(self, n_actions: int, episodes: int, updates: int, seed: int):
        try:
            import optuna
        except ImportError:
            raise JelError(
                "--method halving needs the package optuna: pip install 'just-enough-learning[search]'"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self.episodes, self.updates = optuna, episodes, updates
        sampler = optuna.samplers.TPESampler(seed=seed % 2**32, constant_liar=True)  # many are asked before one is told
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._space: dict[str, Any] = {
            f"x{i}": optuna.distributions.FloatDistribution(-EDGE, EDGE) for i in range(n_actions)
        }
        self._asked, self._playoffs = 0, False
        self._racing: list[Candidate] = []
        self._finishers: list[Candidate] = []  # have been trained to the end at least once
        self._heard: Candidate | None = None
        self._best, self._best_rung = Candidate(torch.zeros(n_actions)), 0

    def ask(self, ends: Sequence[int]) -> tuple[Tensor, int]:
        ladder = rungs(len(ends))[-self.updates :]  # with fewer groups than rungs the lowest are left out
        bracket, rung = divmod(self._asked, len(ladder))
        if bracket >= self.updates // len(ladder):
            self._decisions = len(ends)
            if not self._playoffs:
                self._retire(self._racing)
                self._racing, self._playoffs = self._ranked(self._finishers)[: self.episodes], True
                for candidate in self._racing:
                    candidate.returns = []
        else:
            self._decisions = ladder[rung]
            n = rung_size(self.episodes, ends[self._decisions - 1], ends[-1])
            if rung == 0:
                self._retire(self._racing)
                self._racing = [self._new() for _ in range(n)]
            else:
                champions = self._champions() if rung == len(ladder) - 1 else []
                survivors = self._ranked(self._racing)[: max(1, n - len(champions))]
                self._retire([c for c in self._racing if c not in survivors])
                self._racing = champions + survivors
        self._asked += 1
        self._whole = self._decisions == len(ends)
        return torch.stack([c.raw for c in self._racing]), self._decisions

    def tell(self, raw: Tensor, returns: Tensor) -> None:
        finite = returns[returns.isfinite()]
        worst = finite.min().item() - 1 if len(finite) else -1.0  # what blew up is worse than anything that did not
        for candidate, value in zip(self._racing, returns.tolist(), strict=True):
            candidate.returns.append(value if value > -float("inf") else worst)
            if candidate.trial is not None:
                candidate.trial.report(candidate.returns[-1], self._decisions)
        if self._whole:
            self._finishers += [c for c in self._racing if c not in self._finishers]
        if self._decisions >= self._best_rung:
            self._best, self._best_rung = self._ranked(self._racing)[0], self._decisions

    def hear(self, found: Finding) -> None:
        raw, value, decisions, whole = found
        trial, state = self._optuna.trial, self._optuna.trial.TrialState
        self._study.add_trial(
            trial.create_trial(
                state=state.COMPLETE if whole else state.PRUNED,
                value=value if whole else None,
                params=self._position(raw),
                distributions=self._space,
                intermediate_values={decisions: value},
            )
        )
        if whole and (self._heard is None or value > self._heard.returns[-1]):
            self._heard = Candidate(raw, returns=[value])

    def best(self) -> Tensor:
        return self._best.raw

    def _new(self) -> Candidate:
        trial = self._study.ask(self._space)
        return Candidate(torch.atanh(torch.tensor([trial.params[name] for name in self._space])), trial)

    def _position(self, raw: Tensor) -> dict[str, float]:
        return dict(zip(self._space, torch.tanh(raw).clamp(-EDGE, EDGE).tolist()))

    def _champions(self) -> list[Candidate]:
        """The winner of the bracket before, and the best that was heard of since."""
        own = [self._best] if self._best in self._finishers else []
        heard, self._heard = self._heard, None
        return own + ([heard] if heard else [])

    def _ranked(self, candidates: list[Candidate]) -> list[Candidate]:
        """Best first, by the last rung, or by all play-offs together: there the field stays the same."""
        return sorted(candidates, key=lambda c: -(sum(c.returns) if self._playoffs else c.returns[-1]))

    def _retire(self, candidates: list[Candidate]) -> None:
        """Tell the sampler that these are not trained any further."""
        state = self._optuna.trial.TrialState
        for c in candidates:
            if c.trial is None:
                continue
            if c in self._finishers:
                self._study.tell(c.trial, c.returns[-1], state=state.COMPLETE)
            else:
                self._study.tell(c.trial, state=state.PRUNED)
            c.trial = None
