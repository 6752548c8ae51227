"""What several searching processes found, in one file that they all append to: an Optuna journal.

It works between machines on a network file system, and Optuna's own tools read it. A process takes over what the
others found at moments that its own checkpoint remembers, so that it resumes exactly although they go on meanwhile.
A knobs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jel.errors import JelError
from jel.knobs import Knob

STUDY = "jel"


class Finding(NamedTuple):
    """What another process tried: the (A,) raw action, its return, and after how many decisions, perhaps all."""

    raw: Tensor
    value: float
    decisions: int
    whole: bool


class SharedResults:
    """The file `path`; `process` tells this process from the others that search in it (a seed of its own).

    Raises `JelError` if `optuna` is not installed, or the file is not such a journal or holds other knobs.
    """

    def __init__(self, path: Path, knobs: Sequence[Knob], process: int):
        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend
        except ImportError:
            raise JelError(
                "sharing a search needs the package optuna: pip install 'just-enough-learning[search]'"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._trial, self.process = optuna.trial, process
        self.known = 0  # trials of the file that `news` has been through: a checkpoint keeps it
        self._names = [knob.name for knob in knobs]
        spread = optuna.distributions.FloatDistribution(-1e3, 1e3)
        self._space: dict[str, Any] = {name: spread for name in self._names}
        described = [[knob.name, knob.hyperparameter, list(knob.groups), list(knob.bounds)] for knob in knobs]
        self.path = path
        with self._one_line():
            path.parent.mkdir(parents=True, exist_ok=True)
            storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
            self._study = optuna.create_study(
                study_name=STUDY, storage=storage, direction="maximize", load_if_exists=True
            )
            theirs = self._study.user_attrs.get("knobs")
            if theirs is None:
                self._study.set_user_attr("knobs", described)
        if theirs not in (None, described):
            raise JelError(f"{path} holds a search over other knobs; give another file")

    def publish(self, update: int, raw: Tensor, returns: Tensor, decisions: int, whole: bool) -> None:
        """Append an update's candidates, (n, A) and (n,); none twice, though a kill may have repeated the update."""
        states = self._trial.TrialState
        with self._one_line():
            there = {tuple(t.user_attrs.get("key", ())) for t in self._study.get_trials(deepcopy=False)}
            for i, (x, value) in enumerate(zip(raw.tolist(), returns.tolist(), strict=True)):
                key = self.process, update, i
                if value == -float("inf") or key in there:
                    continue
                self._study.add_trial(
                    self._trial.create_trial(
                        state=states.COMPLETE if whole else states.PRUNED,
                        value=value if whole else None,
                        params=dict(zip(self._names, x)),
                        distributions=self._space,
                        intermediate_values={decisions: value},
                        user_attrs={"key": key},
                    )
                )

    def news(self) -> list[Finding]:
        """What the others have found since the last call."""
        with self._one_line():
            trials = self._study.get_trials(deepcopy=False)
        fresh, self.known = trials[self.known :], len(trials)
        found = []
        for trial in fresh:
            process, *_ = trial.user_attrs.get("key", [self.process])
            for decisions, value in trial.intermediate_values.items() if process != self.process else ():
                raw = torch.tensor([trial.params[name] for name in self._names])
                found.append(Finding(raw, value, decisions, trial.state == self._trial.TrialState.COMPLETE))
        return found

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError) as e:
            message = f"{self.path} cannot be used as the file of a shared search ({e}); give another"
            raise JelError(" ".join(message.split())) from None
